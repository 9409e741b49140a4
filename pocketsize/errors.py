"""Mistakes of the user."""


class UserError(ValueError):
  """A mistake of the user: the message says what is wrong, the legal values and what was received.

  Command lines print the message alone and leave with exit code 2.
  """
