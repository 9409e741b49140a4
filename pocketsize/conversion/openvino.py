"""OpenVINO IR, an .xml and a .bin file, from ONNX."""

import errno
import os
import pathlib
import re
import shutil
import tempfile

from pocketsize.conversion import onnx
from pocketsize.conversion.errors import conversion_error, require

# A file system with less room than this is full: no write of the saver fits.
_BLOCK = 1 << 16


def convert(lowered, path):
  """Writes path (.xml) and the weights beside it (.bin), float32 inputs and outputs, dynamic batch.

  Args:
    lowered: a `Lowered` model.
    path: of the .xml file.

  Raises:
    UserError: a package is missing, or a converter refuses an operation.
    OSError: the files cannot be written.
  """
  openvino = require('openvino', 'to write OpenVINO files')
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'model.onnx')
    onnx.convert(lowered, source, pairs_joins=False)
    try:
      model = openvino.convert_model(str(source))
    except Exception as error:
      raise conversion_error('OpenVINO', error) from error
  # What has no name of its own is numbered through the whole life of the process.
  for index, operation in enumerate(model.get_ordered_ops()):
    if re.fullmatch(r'[A-Z]\w*_\d+', operation.get_friendly_name()):
      operation.set_friendly_name(f'{operation.get_type_name()}_{index}')
  try:
    openvino.save_model(model, str(path), compress_to_fp16=False)
  except RuntimeError as error:
    # Its message does not say why the stream broke.
    full = shutil.disk_usage(pathlib.Path(path).parent).free < _BLOCK
    code = errno.ENOSPC if full else errno.EIO
    raise OSError(code, os.strerror(code), str(path)) from error
