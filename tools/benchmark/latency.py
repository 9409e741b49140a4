"""Latency at batch 1 of exported files, measured in turn in one run:

python -m tools.benchmark.latency --files=model.tflite,model_int8.tflite
"""

from tools import command  # isort: skip (first: it keeps TensorFlow's start quiet)

from absl import flags

from pocketsize import conversion

_FILES = flags.DEFINE_list(
  'files', None, 'exported files, comma-separated; ratios are to the first'
)
_ROUNDS = flags.DEFINE_integer('rounds', 100, 'bursts of 10 calls of each file', lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 1, 'threads of each runtime', lower_bound=1)


def main():
  milliseconds = conversion.latency(_FILES.value, _ROUNDS.value, _THREADS.value)
  rows = [
    (path, f'{value:.4f}', f'{value / milliseconds[0]:.3f}', f'{conversion.size(path):,}')
    for path, value in zip(_FILES.value, milliseconds, strict=True)
  ]
  command.print_table(('file', 'ms', 'ratio', 'bytes'), rows)


if __name__ == '__main__':
  flags.mark_flags_as_required(['files'])
  command.run(main)
