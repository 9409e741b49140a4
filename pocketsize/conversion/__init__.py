"""Exporting models to TFLite, ONNX and OpenVINO, and running the files."""

from pocketsize.conversion.formats import (
  FORMATS,
  ExportedFile,
  check_formats,
  export,
  float_version,
  formats_for,
  is_quantized,
)
from pocketsize.conversion.inspection import count_ops
from pocketsize.conversion.runners import open_file
from pocketsize.conversion.verification import latency, quickest, size, verify, verify_files

__all__ = [
  'FORMATS',
  'check_formats',
  'ExportedFile',
  'count_ops',
  'export',
  'float_version',
  'formats_for',
  'is_quantized',
  'latency',
  'open_file',
  'quickest',
  'size',
  'verify',
  'verify_files',
]
