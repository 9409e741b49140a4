"""What the processor at hand does to integers that is no fault of a file.

x86 processors with VNNI (Intel since 2019, AMD since Zen 4) add products of int8 in 32 bits. The
kernels for others add them by pairs in 16 bits, where large ones overflow. LiteRT's do not, ONNX
Runtime's do not if they are told so (`runners.session_options`), OpenVINO's cannot be told.
"""

import pathlib
import platform
import re

_CPUINFO = pathlib.Path('/proc/cpuinfo')
_NOTES = {
  'openvino_int8': 'this processor has no VNNI, and OpenVINO adds pairs of int8 products in 16 '
  'bits on it, which may overflow: judge the file on one that has',
  'onnx_qdq': 'this processor has no VNNI: a program needs the session option '
  'session.x64quantprecision=1, with which it was run here',
}


def overflows(format_, cpuinfo=_CPUINFO):
  """Returns whether the runtime of a format may compute integers wrongly here, whatever it is told.

  Args:
    format_: of `formats.FORMATS`.
    cpuinfo: path of what the system says of its processors.
  """
  return format_ == 'openvino_int8' and _adds_in_16_bits(cpuinfo)


def note(format_, cpuinfo=_CPUINFO):
  """Returns a sentence about a format on this processor, or ''."""
  return _NOTES.get(format_, '') if _adds_in_16_bits(cpuinfo) else ''


def _adds_in_16_bits(cpuinfo):
  """Returns whether this is an x86 processor without VNNI.

  Where the processor does not say what it has, as on systems other than Linux, the answer is no.
  """
  if platform.machine() not in ('x86_64', 'AMD64') or not cpuinfo.exists():
    return False
  return re.search(r'\bavx(512)?_vnni\b', cpuinfo.read_text()) is None
