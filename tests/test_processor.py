"""Which processors add products of int8 in 16 bits, by what Linux says of them."""

import pytest

from pocketsize.conversion import processor
from pocketsize.conversion.runners import session_options


@pytest.mark.parametrize(
  ('flags', 'machine', 'expected'),
  [
    ('fpu avx2', 'x86_64', True),
    ('fpu avx2 avx_vnni', 'x86_64', False),
    ('avx512f avx512_vnni', 'x86_64', False),
    ('avx512f', 'x86_64', True),
    ('asimd', 'aarch64', False),
  ],
)
def test_two_may_overflow_without_vnni(tmp_path, monkeypatch, flags, machine, expected):
  cpuinfo = tmp_path / 'cpuinfo'
  cpuinfo.write_text(f'processor : 0\nflags : {flags}\n')
  monkeypatch.setattr(processor.platform, 'machine', lambda: machine)
  assert processor.overflows('openvino_int8', cpuinfo) == expected
  for format_ in ('openvino_int8', 'onnx_qdq'):
    assert ('VNNI' in processor.note(format_, cpuinfo)) == expected
  for format_ in ('openvino', 'onnx', 'tflite_int8'):
    assert processor.note(format_, cpuinfo) == ''
  # A session can be told not to.
  assert not processor.overflows('onnx_qdq', cpuinfo)
  assert not processor.overflows('openvino_int8', tmp_path / 'missing')


def test_onnx_runtime_is_told_not_to_overflow():
  """It would not be seen on a processor that cannot."""
  options = session_options(1)
  assert options.get_session_config_entry('session.x64quantprecision') == '1'
