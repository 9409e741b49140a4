"""From a config_list to an instrumented model: the door for a third party's training script."""

import dataclasses

from pocketsize import compressor, targets
from pocketsize.calibration import calibrate, fit_scales
from pocketsize.copies import check_copyable
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.instrument import Instrumented, instrument

_TARGET_KEYS = ('algorithm', 'op_types', 'op_names', 'exclude')


def stack_from(config_list):
  """Returns a `Stack` for a config_list.

  Args:
    config_list: list of dicts. 'algorithm' names a registered compressor; 'op_types', 'op_names'
      and 'exclude' say which layers (see `targets.Rule`); the other keys are fields of the
      algorithm's configuration, and mean nothing beside 'exclude'. Of the dicts of one algorithm
      the last that matches a layer wins.

  Raises:
    UserError: an unknown algorithm or key, a value out of range, no algorithm.
  """
  rules_by_algorithm = {}
  for entry in config_list:
    if not isinstance(entry, dict) or 'algorithm' not in entry:
      raise UserError(
        "Every entry of a config_list is a dict with a key 'algorithm', one of "
        f'{", ".join(compressor.discover())}. Received: {entry!r}.'
      )
    config_type = compressor.find(entry['algorithm']).Config
    fields = {field.name for field in dataclasses.fields(config_type)}
    unknown = set(entry) - fields - set(_TARGET_KEYS)
    if unknown:
      raise UserError(
        f'A config_list entry for {entry["algorithm"]!r} takes the keys '
        f'{", ".join([*_TARGET_KEYS, *sorted(fields)])}. '
        f'Received: {", ".join(map(repr, sorted(unknown)))}.'
      )
    rules_by_algorithm.setdefault(entry['algorithm'], []).append(_rule(entry, config_type, fields))
  if not rules_by_algorithm:
    raise UserError('A config_list needs at least one entry. Received: [].')
  return compressor.Stack(
    compressor.find(name)(rules) for name, rules in rules_by_algorithm.items()
  )


def _rule(entry, config_type, fields):
  for key in ('op_types', 'op_names'):
    if isinstance(entry.get(key, ()), str):
      raise UserError(f'`{key}` must be a list of texts. Received: {entry[key]!r}.')
  try:
    given = {key: value for key, value in entry.items() if key in fields}
    # What is left alone needs none, and some have no defaults.
    config = None if entry.get('exclude') else config_type(**given)
  except TypeError as error:
    # A comparison with a value of another type.
    raise UserError(
      f'A config_list entry for {entry["algorithm"]!r} has a value of the wrong type: {error}. '
      f'Received: {entry!r}.'
    ) from error
  return targets.Rule(
    config,
    tuple(entry.get('op_types', ())),
    tuple(entry.get('op_names', ())),
    bool(entry.get('exclude', False)),
  )


def attach(model, stack):
  """Returns `model` instrumented with what `stack` plans, and bound to it.

  Raises:
    UserError: a model that is instrumented already, whose graph cannot be seen, or that could not
      be copied when it is stripped.
  """
  if isinstance(model, Instrumented):
    kinds = dict.fromkeys(type(transform).__name__ for transform in model.transforms)
    raise UserError(
      'A model is compressed once: give all algorithms in one config_list, or `strip(model)`, which'
      f' has the weights as deployed. Received: {model.name!r}, which has been compressed already '
      f'({", ".join(kinds) or "by nothing"}).'
    )
  graph = Graph(model)
  check_copyable(graph)
  instrumented = instrument(model, stack.plan(graph))
  stack.bind(instrumented)
  return instrumented


def compress(model, config_list, *, calibration=None):
  """Returns (instrumented model, stack) ready to train.

  The instrumented model shares the weights of `model`. Train it with
  `fit(callbacks=[CompressionCallback(stack)])`, or in a loop of your own that calls
  `stack.update(step)` before every optimizer step and after the last, and adds
  `stack.loss(x, y, outputs)` to its loss. Then `strip` and `export`.

  Args:
    model: a built Functional or Sequential Keras model, nested ones included.
    config_list: see `stack_from`.
    calibration: iterable of input batches from which activation ranges start. Without it the first
      training batch sets them.

  Raises:
    UserError: a model that was compressed already or whose graph cannot be seen, or a config_list
      that makes no sense.
  """
  stack = stack_from(config_list)
  instrumented = attach(model, stack)
  # Masks come first: scales and ranges are those of what they leave.
  stack.update(0)
  if calibration is None:
    fit_scales(instrumented)
  else:
    calibrate(instrumented, calibration)
  stack.update(0)
  return instrumented, stack
