"""The documentation is true: pages made from code, links, paths, flags, keys, programs."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from toys import conv_net, images, labels

import pocketsize
from evaluators.classification import Classification
from pocketsize import conversion, report

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGES = ('pocketsize', 'learners', 'nets', 'datasets', 'evaluators', 'scripts')
PLACEHOLDERS = {'name', 'noname', 'flag', 'flags'}
TOP = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith('.')} - {
  'runs'
}


def text_of(name):
  return (ROOT / name).read_text()


def blocks(text, language):
  """Returns the contents of a page's fenced blocks of one language."""
  return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def files_in(text):
  """Returns {path: content} of the Python files that a page shows."""
  return {
    block.partition('\n')[0].removeprefix('# '): block.partition('\n')[2]
    for block in blocks(text, 'python')
    if re.match(r'# [\w/]+\.py\n', block)
  }


def anchors(text):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(text):
  """Returns the targets of a page's links that are no URLs."""
  return [target for target in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in target]


def broken_links(page, text):
  """Returns the relative links of `text` that lead nowhere from the place of `page`."""
  broken = []
  for link in links(text):
    target, _, anchor = link.partition('#')
    path = page.parent / target
    if target and not path.exists():
      broken.append(link)
    elif anchor and anchor not in anchors(path.read_text() if target else text):
      broken.append(link)
  return broken


def missing_paths(text):
  """Returns the repository paths in backticks or blocks that do not exist."""
  prose = re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
  words = re.findall(r'`([^`\s]+)`', prose)
  words += re.split(r'[\s=]+', ' '.join(blocks(text, '(?:sh)?')))
  found = [word.removeprefix('./').rstrip('.,') for word in words]
  found = [word for word in found if '/' in word and word.split('/')[0] in TOP and '<' not in word]
  return [
    word for word in found if word not in files_in(text) and not list(ROOT.glob(word.rstrip('/')))
  ]


def known_flags():
  """Returns the names of all flags: of nets and learners, of tools, and of the scripts."""
  names = set(re.findall(r'^\| `(\w+)` \|', text_of('docs/flags.md'), re.MULTILINE)) | {
    'help',
    'flagfile',
  }
  for path in [*ROOT.glob('tools/*/*.py'), *ROOT.glob('examples/*.py'), *ROOT.glob('scripts/*.sh')]:
    names.update(re.findall(r"DEFINE_\w+\(\s*'(\w+)'|--(\w+)", path.read_text()))
  return {name for found in names for name in ([found] if isinstance(found, str) else found)} - {''}


def unknown_flags(text):
  """Returns the flags that a page mentions and that do not exist."""
  mentioned = set(
    re.findall(
      r'(?<![\w-])--(\w+)', re.sub(r'^```text\n.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
    )
  )
  own = {
    name
    for content in files_in(text).values()
    for name in re.findall(r'^    (\w+): ', content, re.MULTILINE)
  }
  return mentioned - known_flags() - own - PLACEHOLDERS


# Runs a module as `python -m` does, and then says whether it has imported what draws pictures.
WITHOUT_PICTURES = """
import atexit, runpy, sys
atexit.register(lambda: print('matplotlib' in sys.modules))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__')
"""


def test_the_page_of_flags_is_that_of_the_code():
  """Its tool imports what all command lines do, and nothing that Keras would only like to have."""
  command = [sys.executable, '-c', WITHOUT_PICTURES, 'tools.docs.flags', '--check']
  # Tests of benchmarks import tfmot, which sets it; Keras 2 would then be imported, with pictures.
  environment = {k: v for k, v in os.environ.items() if k != 'TF_USE_LEGACY_KERAS'}
  done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[-1] == 'False'


def test_every_option_has_a_meaning():
  cells = re.findall(r'^\| `(\w+)` \|.*\| *([^|]*) \|$', text_of('docs/flags.md'), re.MULTILINE)
  assert len(cells) > 40
  assert [name for name, meaning in cells if not meaning.strip()] == []


@pytest.mark.parametrize('name', NAMES)
def test_links_lead_somewhere(name):
  assert broken_links(ROOT / name, text_of(name)) == []


@pytest.mark.parametrize('name', NAMES)
def test_paths_exist(name):
  assert missing_paths(text_of(name)) == []


@pytest.mark.parametrize('name', NAMES)
def test_flags_exist(name):
  assert unknown_flags(text_of(name)) == set()


def test_what_is_wrong_is_found():
  text = (
    '# A page\n[a](nothing.md) [b](../README.md) [c](#a-page) [d](#no-page) '
    '`learners/nothing.py` `learners/main.py`\n'
    '```sh\n./scripts/nothing.sh nets/lenet_at_cifar10_run.py --learner=uniform --nothing\n```\n'
  )
  assert broken_links(ROOT / 'docs' / 'page.md', text) == ['nothing.md', '#no-page']
  assert missing_paths(text) == ['learners/nothing.py', 'scripts/nothing.sh']
  assert unknown_flags(text) == {'nothing'}


def keys(value, prefix=''):
  """Yields the dotted keys of JSON values, '[]' for the entries of a list."""
  if isinstance(value, list):
    for entry in value:
      yield from keys(entry, f'{prefix}[]')
  elif isinstance(value, dict):
    for key, inner in value.items():
      yield f'{prefix}.{key}'.lstrip('.')
      if key not in ('metrics', 'seconds', 'versions', 'skipped', 'config'):
        yield from keys(inner, f'{prefix}.{key}'.lstrip('.'))


def test_every_key_of_report_and_plan_is_documented(tmp_path):
  x, y = images(), labels()
  model, stack = pocketsize.compress(conv_net(), [{'algorithm': 'uniform'}], calibration=[x])
  file = pocketsize.export(model, tmp_path, ['tflite_int8'])[0]
  entry = pocketsize.verify(
    file, [(x, y)], np.asarray(model(x)), Classification(), latency_rounds=1
  )
  pocketsize.write_packed(model, tmp_path / 'net.packed')
  metrics = {'accuracy': 1.0, 'loss': 0.0}
  result = report.build(
    model,
    float_model=model.source,
    pruned=(model.source, metrics),
    names={'model': 'm', 'dataset': 'd', 'learner': 'uniform'},
    float_metrics=metrics,
    metrics=metrics,
    bytes_=(1, 1),
    files=[entry],
    seconds={},
    command='',
    packed=pocketsize.packed.verify(tmp_path / 'net.packed', model),
  )
  assert file.format in conversion.FORMATS
  documented = set(re.findall(r'`([\w.\[\]]+)`', text_of('docs/report.md')))
  assert {*keys(result), *keys(report.plan(model, stack))} - documented == set()


ONE_AFTER_THE_OTHER = """
import runpy
import sys

for path in sys.argv[1:]:
  print('\\f', end='', flush=True)
  runpy.run_path(path, run_name='__main__')
"""


@pytest.mark.slow
def test_the_programs_of_extending_run(tmp_path):
  text = text_of('docs/extending.md')
  for name in PACKAGES:
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
  for path, content in files_in(text).items():
    (tmp_path / path).write_text(content)
  environment = {**os.environ, 'POCKETSIZE_VENV': sys.prefix, 'PYTHONPATH': str(tmp_path)}
  commands = ''.join(blocks(text, 'sh')).replace('\\\n', '').splitlines()
  assert len(commands) == 4
  learning, *others = map(shlex.split, commands)
  assert [words[0] for words in others] == ['python'] * 3
  # In one process, of which most of the time is the begin.
  together = [sys.executable, '-c', ONE_AFTER_THE_OTHER, *(path for _, path in others)]
  for words in (learning, together):
    done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
  trained, pruned, chosen = done.stdout.split('\f')[1:]
  folder = tmp_path / 'runs' / 'mlp_at_tumours' / 'n-of-m'
  result = json.loads((folder / 'report.json').read_text())
  assert {layer['name']: layer['sparsity'] for layer in result['layers']} == {
    'hidden0': 0.0,
    'hidden1': 0.5,
    'logits': 0.5,
  }
  assert result['compressed']['metrics']['accuracy'] > 0.9
  assert json.loads((folder / 'plan.json').read_text())['skipped'] == {
    'hidden0': 'its inputs do not come in groups of 4'
  }
  assert 'left alone: {}' in trained
  assert "left alone: {'first': 'first convolution', 'head': 'frozen: " in pruned
  assert 'measured, 0.' in chosen
  assert (tmp_path / 'smaller' / 'model.tflite').exists()
  assert sorted(path.name for path in (tmp_path / 'exports').iterdir()) == [
    'model_int8.tflite',
    'model_qdq.onnx',
  ]


def test_the_programs_of_the_page_of_channels_run():
  inputs = keras.Input((8, 8, 3))
  x = inputs
  for width in (32, 32):
    x = keras.layers.Conv2D(width, 3, activation='relu')(x)
  x = keras.layers.GlobalAveragePooling2D()(x)
  model = keras.Model(inputs, keras.layers.Dense(4)(x))
  scope = {'model': model, 'batches': [images()]}
  for block in blocks(text_of('docs/channels.md'), 'python'):
    exec(block, scope)
    assert scope.get('smaller', model).count_params() <= model.count_params()
  assert scope['smaller'].count_params() < 0.5 * model.count_params()


def test_the_programs_of_the_page_of_allocation_run():
  scope = {}
  for block in blocks(text_of('docs/allocation.md'), 'python'):
    exec(block, scope)
  problem, outcome = scope['problem'], scope['outcome']
  assert problem.is_met(outcome.levels)
  assert scope['score'](outcome.levels) > scope['score']([2, 2, 2])
  content = json.loads((scope['folder'] / 'search.json').read_text())
  assert content['done'] == 30 and (scope['folder'] / 'search.png').stat().st_size > 0
  shutil.rmtree(scope['folder'])
  named = set(re.findall(r'`(\w+)`', text_of('docs/allocation.md')))
  assert {*content, *content['problem'], *content['records'][0], 'values'} <= named
