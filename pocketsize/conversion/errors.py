"""What went wrong in a converter, in one sentence."""

import importlib
import os
import re
import sys

from pocketsize.conversion.lowering import SCOPE
from pocketsize.errors import UserError

_PACKAGES = {
  'tf2onnx': 'tf2onnx',
  'onnx': 'onnx',
  'onnxruntime': 'onnxruntime',
  'openvino': 'openvino',
  'ai_edge_litert': 'ai-edge-litert',
  'tf_keras': 'tf_keras',
  'tensorflow_model_optimization': 'tensorflow-model-optimization',
}


def require(module, purpose):
  """Imports and returns `module`.

  Args:
    module: such as 'onnxruntime' or 'ai_edge_litert.interpreter'.
    purpose: what it is needed for: 'to run ONNX files'.

  Raises:
    UserError: its package is missing or broken.
  """
  package = _PACKAGES[module.partition('.')[0]]
  # Both report to their makers unless the user refused: OpenVINO imports and conversions, from a
  # fork of the process, where it finds this package; ONNX Runtime sessions, from its own threads.
  sys.modules.setdefault('openvino_telemetry', None)
  os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f'Package {package!r} is needed {purpose}: pip install {package}. Received: {error}.'
    ) from error


class Folded(Exception):
  """A converter folded other operations into kernels, or kernels into other constants.

  Attributes:
    paths: of the layers.
  """

  def __init__(self, paths):
    self.paths = list(dict.fromkeys(paths))
    super().__init__(f'Kernels of {", ".join(map(repr, self.paths))} were folded.')


def conversion_error(name, error):
  """Returns a UserError for what a converter refused.

  Args:
    name: of the format.
    error: the converter's exception.
  """
  text = str(error)
  # TensorFlow's converter has the operation's name among its details only.
  details = ' '.join([text, *map(str, getattr(error, 'errors', ()))])
  layers = dict.fromkeys(
    match.strip('.') for match in re.findall(rf'(?<!\w){SCOPE}([\w.]+)', details)
  )
  where = (
    f' at layer {", ".join(repr(layer.replace(".", "/")) for layer in list(layers)[:3])}'
    if layers
    else ''
  )
  lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
  line = next((line for line in lines if 'error' in line.lower()), lines[0])
  return UserError(f'The {name} converter refuses the model{where}: {line[:300]}')
