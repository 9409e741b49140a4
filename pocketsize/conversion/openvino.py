"""OpenVINO IR, an .xml and a .bin file, from ONNX."""

import errno
import os
import pathlib
import re
import shutil
import tempfile

from pocketsize.conversion import onnx
from pocketsize.conversion.errors import conversion_error, require
from pocketsize.conversion.kernels import fit_int4

# A file system with less room than this is full: no write of the saver fits.
_BLOCK = 1 << 16


def convert(lowered, path, int4=True):
  """Writes path (.xml) and the weights beside it (.bin), float32 inputs and outputs, dynamic batch.

  Args:
    lowered: a `Lowered` model.
    path: of the .xml file.
    int4: whether codes from -8 to 7 are stored in 4 bits.

  Returns:
    The list of kernels that are.

  Raises:
    Folded: kernels that the file has not as they were.
    UserError: a package is missing, or a converter refuses an operation.
    OSError: the files cannot be written.
  """
  openvino = require('openvino', 'to write OpenVINO files')
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'model.onnx')
    onnx.convert(lowered, source, int4=False, pairs_joins=False)
    try:
      model = openvino.convert_model(str(source))
    except Exception as error:
      raise conversion_error('OpenVINO', error) from error
  if int4:
    _store_int4(openvino, model)
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
  return [kernel for kernel in lowered.kernels if int4 and kernel.fits_int4]


def _store_int4(openvino, model):
  """Stores int8 codes of kernels that all lie from -8 to 7 in 4 bits, with a Convert to int8.

  OpenVINO computes the Convert once, when it compiles the model. From int4 itself it computes
  convolutions in float.
  """
  for operation in model.get_ordered_ops():
    if (
      operation.get_type_name() != 'Constant'
      or operation.get_element_type() != openvino.Type.i8
      or len(operation.shape) < 2
      or not fit_int4(operation.data)
    ):
      continue
    codes = openvino.op.Constant(openvino.Type.i4, operation.shape, operation.data.ravel().tolist())
    codes.set_friendly_name(operation.get_friendly_name())
    readers = operation.output(0).get_target_inputs()
    expanded = openvino.opset13.convert(codes, 'i8')
    for reader in readers:
      reader.replace_source_output(expanded.output(0))
