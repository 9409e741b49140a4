"""Our nets by their names, for the benchmarks that take one."""

from pocketsize.errors import UserError
from tools.docs.flags import helpers


def helper(name, options, others=''):
  """Returns the `ModelHelper` of a net.

  Args:
    name: of its module, such as 'resnet_at_cifar10'.
    options: {field of its configuration: value, or None for the default}.
    others: what else the flag --net may be, for the message.

  Raises:
    UserError: there is no such net.
  """
  known = helpers()
  if name not in known:
    raise UserError(f'--net must be one of {", ".join(known)}{others}. Received: {name!r}.')
  given = {field: value for field, value in options.items() if value}
  return known[name](known[name].Config(**given))
