"""Mistakes of the user, and those of libraries in a few words."""

import re


class UserError(ValueError):
  """A mistake of the user: the message says what is wrong, the legal values and what was received.

  Command lines print the message alone and leave with exit code 2.
  """


def first_sentence(error):
  """Returns the first sentence of an exception's message, or its type's name if it has none."""
  # What tf_keras says of where it was.
  where = r'^Exception encountered when calling.*?\n\n(?:in user code:.*?\w+Error: )?'
  text = re.sub(where, '', str(error).strip(), flags=re.DOTALL)
  named = re.sub(r'<function (\w+) at \w+>', r'\1', text)
  return re.split(r'\.\s|\.$|\n', named)[0] or type(error).__name__
