"""Exports a saved model.

python -m tools.conversion.export --model=quantized.keras --output_dir=exports --packed
"""

from tools import command  # isort: skip (first: it keeps TensorFlow's start quiet)

import pathlib

from absl import flags

from pocketsize import conversion, packed
from pocketsize.saving import load_model

_MODEL = flags.DEFINE_string(
  'model', None, 'saved Keras model: quantized.keras, final.keras or any other .keras file'
)
_OUTPUT = flags.DEFINE_string('output_dir', None, 'folder of the exported files')
_FORMATS = flags.DEFINE_list(
  'formats',
  None,
  f'comma-separated, out of {", ".join(conversion.FORMATS)}; default: all that the model has',
)
_NAME = flags.DEFINE_string(
  'name', None, "what the files' names begin with; default: the name of --model"
)
_TFLITE_INT4 = flags.DEFINE_bool(
  'tflite_int4', False, 'TFLite files store weights of up to 4 bits in 4 bits: smaller, and slower'
)
_PACKED = flags.DEFINE_bool(
  'packed', False, 'also write the weights at exactly their bits, to a .packed file'
)


def main():
  model = load_model(_MODEL.value)
  name = _NAME.value or pathlib.Path(_MODEL.value).stem
  files = conversion.export(
    model, _OUTPUT.value, _FORMATS.value, name, tflite_int4=_TFLITE_INT4.value
  )
  rows = []
  for file in files:
    operations = ' / '.join(map(str, conversion.count_ops(file.path)))
    rows.append((file.format, str(file.path), f'{conversion.size(file.path):,}', operations))
  if _PACKED.value:
    path = pathlib.Path(_OUTPUT.value, f'{name}.packed')
    packed.write(model, path)
    rows.append(('packed', str(path), f'{path.stat().st_size:,}', ''))
  command.print_table(('format', 'path', 'bytes', 'int8 / float ops'), rows)
  for file in files:
    if file.note:
      print(f'{file.format}: {file.note}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['model', 'output_dir'])
  command.run(main)
