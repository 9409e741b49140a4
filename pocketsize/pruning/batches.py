"""The arrays of a batch, in the order of a model's inputs."""

from pocketsize import records
from pocketsize.errors import UserError
from pocketsize.graph import functional


def in_order(model, batch):
  """Returns the arrays of a batch as a list, one for each input of a model, in their order.

  The arrays are those given, not tensors of them: batches may be most of what is in memory.

  Args:
    model: a built Functional or Sequential model.
    batch: inputs as the model takes them: an array [batch, ...], or a list of them, or a dict by
      the names under which the model has its inputs.

  Raises:
    UserError: there are other arrays than the model has inputs.
  """
  top = functional(model)
  names = records.input_names(top)
  if isinstance(batch, dict):
    _refuse_unless(set(batch) >= set(names), model, names, list(batch))
  arrays = records.in_order(top, batch)
  _refuse_unless(len(arrays) == len(top.inputs), model, names, f'{len(arrays)} arrays')
  return arrays


def _refuse_unless(legal, model, names, received):
  if not legal:
    raise UserError(
      f'A batch of model {model.name!r} must have an array for each of its inputs: '
      f'{", ".join(names)}. Received: {received}.'
    )
