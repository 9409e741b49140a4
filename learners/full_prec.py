"""`full-prec`: the float model, trained or pretrained, exported and measured as it is."""

import dataclasses

from learners.learner import Learner
from pocketsize.errors import UserError
from pocketsize.options import check_options


class FullPrecision(Learner):
  """No compression. With --enbl_dst the float model is itself trained with a teacher."""

  name = 'full-prec'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """The learner has no flags of its own."""

    def __post_init__(self):
      check_options(self)

  def compressors(self, graph, steps):
    return []

  def epochs(self):
    return 0.0

  def check(self):
    if self.run.enbl_dst and (not self.run.save_path_dst or self.run.pretrained):
      raise UserError(
        '--learner=full-prec with --enbl_dst trains a model from scratch with a teacher: it needs '
        '--save_path_dst=FILE and no --pretrained. '
        f'Received: --save_path_dst={self.run.save_path_dst}, --pretrained={self.run.pretrained}.'
      )
    super().check()

  def float_compressors(self):
    return [self.distillation(None)] if self.run.enbl_dst else []
