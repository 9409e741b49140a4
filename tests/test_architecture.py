"""The rules of docs/design.md section 2, read from the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = (
  'pocketsize',
  'learners',
  'nets',
  'datasets',
  'evaluators',
  'scripts',
  'tools',
  'examples',
)
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob('*.py'))
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]
LONGEST = 400
# Packages that few runs need, and that take seconds together.
SLOW = {'matplotlib', 'onnx', 'onnxruntime', 'openvino', 'optuna', 'sklearn', 'tf2onnx'}
# The bridge to tfmot, and what takes part in it.
TFMOT = tuple(f'pocketsize/quantization/{name}.py' for name in ('twin', 'stand_in', 'tfmot_bridge'))


def tree_of(name):
  return ast.parse((ROOT / name).read_text())


def imports_of(tree):
  """Returns the full names of what a module imports, wherever in it."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'relative imports hide what is imported'
      names.update({node.module, *(f'{node.module}.{alias.name}' for alias in node.names)})
    elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'require':
      # An import of what may be missing.
      names.update(each.value for each in node.args[:1] if isinstance(each, ast.Constant))
  return names


def breaks(name, imports):
  """Returns the imports of module `name` that the rules forbid."""
  folder = name.split('/')[0]
  is_run_script = name.endswith('_run.py')

  def among(*packages):
    return {
      found
      for found in imports
      if any((found + '.').startswith(package + '.') for package in packages)
    }

  forbidden = set()
  if folder == 'pocketsize':
    forbidden |= among('absl', 'horovod', 'nets', 'datasets', 'learners', 'evaluators', 'tools')
  if folder == 'learners':
    forbidden |= {
      found
      for found in among('nets')
      if not found.startswith('nets.model_helper') and found != 'nets'
    }
  if folder == 'datasets':
    forbidden |= among('keras')
  if folder not in ('learners', 'tools') and not is_run_script:
    forbidden |= among('absl.flags')
  if name != 'learners/runtime.py':
    forbidden |= among('horovod')
  if not name.startswith('tools/benchmark/') and name not in TFMOT:
    forbidden |= among('tf_keras', 'tensorflow_model_optimization', 'tfmot')
  return forbidden


@pytest.mark.parametrize('name', NAMES)
def test_a_module_imports_only_what_its_folder_may(name):
  assert breaks(name, imports_of(tree_of(name))) == set()


@pytest.mark.parametrize(
  ('name', 'source'),
  [
    ('pocketsize/x.py', 'from absl import logging'),
    ('pocketsize/a/x.py', 'import nets.model_helper'),
    ('pocketsize/x.py', 'def f():\n  from learners import main'),
    ('learners/x.py', 'from nets import lenet_at_cifar10'),
    ('datasets/x.py', 'import keras.ops'),
    ('nets/x.py', 'from absl import flags'),
    ('learners/x.py', 'import horovod.tensorflow as hvd'),
    ('pocketsize/x.py', 'import tf_keras'),
    ('pocketsize/x.py', "def f():\n  return require('tf_keras', 'to test')"),
  ],
)
def test_the_rules_catch_a_breach(name, source):
  assert breaks(name, imports_of(ast.parse(source)))


@pytest.mark.parametrize(
  ('name', 'source'),
  [
    ('pocketsize/x.py', 'import keras'),
    ('learners/x.py', 'from nets.model_helper import ModelHelper'),
    ('learners/runtime.py', 'import horovod.tensorflow as hvd'),
    ('nets/x_run.py', 'from absl import flags'),
    ('datasets/x.py', 'import tensorflow as tf'),
    ('pocketsize/quantization/twin.py', "require('tf_keras', 'for a twin')"),
    ('tools/benchmark/x.py', 'import tf_keras'),
  ],
)
def test_the_rules_let_pass_what_is_allowed(name, source):
  assert not breaks(name, imports_of(ast.parse(source)))


@pytest.mark.parametrize('name', NAMES)
def test_a_module_is_short_enough_to_read(name):
  assert len((ROOT / name).read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize(
  'name', [name for name in NAMES if name.startswith(('pocketsize/', 'learners/', 'evaluators/'))]
)
def test_no_start_waits_for_what_few_runs_need(name):
  statements = [
    each for each in tree_of(name).body if isinstance(each, ast.Import | ast.ImportFrom)
  ]
  found = imports_of(ast.Module(statements, []))
  assert not SLOW & {each.split('.')[0] for each in found} and 'scipy.stats' not in found


def public_without_docstring(node, inherited=False):
  """Yields public functions and classes without docstring; a method of a subclass may inherit."""
  for child in node.body:
    if not isinstance(
      child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    ) or child.name.startswith('_'):
      continue
    if not ast.get_docstring(child) and not (inherited and isinstance(child, ast.FunctionDef)):
      yield child.name
    if isinstance(child, ast.ClassDef):
      yield from public_without_docstring(child, inherited=bool(child.bases))


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('pocketsize/')])
def test_everything_public_in_the_library_has_a_docstring(name):
  tree = tree_of(name)
  assert ast.get_docstring(tree) or not tree.body, 'the module has none'
  properties = [
    node.name
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
    and any(getattr(each, 'id', '') == 'property' for each in node.decorator_list)
  ]
  assert [found for found in public_without_docstring(tree) if found not in properties] == []


def test_a_missing_docstring_is_found():
  tree = ast.parse(
    'def f():\n  pass\nclass A:\n  def g(self):\n    pass\n'
    'class B(A):\n  """B."""\n  def g(self):\n    pass'
  )
  assert list(public_without_docstring(tree)) == ['f', 'A', 'g']
