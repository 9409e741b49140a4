"""OpenVINO IR, an .xml and a .bin file, from ONNX."""

import pathlib
import tempfile

from pocketsize.conversion import onnx
from pocketsize.conversion.errors import conversion_error, require


def convert(lowered, path):
  """Writes path (.xml) and the weights beside it (.bin), float32 inputs and outputs, dynamic batch.

  Args:
    lowered: a `Lowered` model.
    path: of the .xml file.

  Raises:
    UserError: a package is missing, or a converter refuses an operation.
  """
  openvino = require('openvino', 'to write OpenVINO files')
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, 'model.onnx')
    onnx.convert(lowered, source)
    try:
      model = openvino.convert_model(str(source))
    except Exception as error:
      raise conversion_error('OpenVINO', error) from error
  openvino.save_model(model, str(path), compress_to_fp16=False)
