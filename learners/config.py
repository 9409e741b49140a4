"""The flags that every run has, whatever its learner and net."""

import dataclasses

from pocketsize import conversion
from pocketsize.errors import UserError
from pocketsize.options import check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Where a run gets its model, how it trains, what it writes."""

  learner: str = option('full-prec', 'the algorithm, a heading of docs/learners.md')
  exec_mode: str = option(
    'train', 'train and export, or evaluate what a work folder holds', choices=('train', 'eval')
  )
  work_dir: str | None = option(None, 'folder of the run; unset: runs/<net>_at_<dataset>/<learner>')
  pretrained: str | None = option(
    None, 'file of the float model: .keras, .weights.h5 or .npz; unset: it is trained first'
  )
  seed: int = option(
    0, 'of initial weights, order of samples and augmentation', lower=0, upper=2**32 - 1
  )
  batch_size: int = option(128, 'samples of one worker in a training step', lower=1)
  batch_size_eval: int = option(100, 'samples of an evaluation step', lower=1)
  eval_split: str = option(
    'test',
    'evaluate on the test split, or on held-out training data (then not trained on)',
    choices=('test', 'val'),
  )
  lrn_rate_ft: float | None = option(
    None,
    'learning rate at which a compressed model starts, down to 0 by a cosine; like lrn_rate_init '
    'meant for batch_size_norm samples a step, and scaled with their number; unset: a tenth of it',
    above=0,
  )
  freeze_bn_delay: int | None = option(
    None,
    'step of the training of a compressed model from which batch norms compute with their moving '
    'statistics, which then stand still; unset: never',
    lower=0,
  )
  nb_batches_bn: int = option(
    0,
    'batches of training images from which the moving statistics of batch norms are estimated anew '
    'once a compressed model is trained; 0: none',
    lower=0,
  )
  enbl_dst: bool = option(False, 'distill from the float model')
  loss_w_dst: float = option(4.0, 'factor of the distillation loss of the logits', lower=0)
  loss_w_dst_features: float = option(
    0.0,
    "factor of the distillation loss of what layers give, where the student's channels are some of "
    "the teacher's",
    lower=0,
  )
  dst_features: str = option('Add', 'types of those layers, comma-separated')
  tempr_dst: float = option(4.0, 'temperature of the distillation', above=0)
  dst_mixup: float = option(
    0.0,
    'share of the images that are mixed with others, for the teacher to say what they are; without '
    'labels, so the loss of the task is left out',
    lower=0,
    upper=1,
  )
  save_path_dst: str | None = option(
    None, "file of another teacher of the net's architecture; unset: the float model"
  )
  summ_step: int = option(100, 'steps between two reports', lower=1)
  save_step: int = option(10000, 'steps between two checkpoints', lower=1)
  export_formats: str = option(
    'all',
    f'formats to write, comma-separated, out of {", ".join(conversion.FORMATS)}; or none; or '
    'all that the model has',
  )
  tflite_int4: bool = option(
    False,
    'TFLite files store weights of up to 4 bits in 4 bits: smaller, and slower in LiteRT; the '
    'other formats always do',
  )
  enbl_multi_gpu: bool = option(False, 'several workers; set by the scripts')
  debug: bool = option(False, 'show a traceback with an error of the user')

  def __post_init__(self):
    check_options(self)
    unknown = [name for name in self.formats or () if name not in conversion.FORMATS]
    if unknown:
      raise UserError(
        f'--export_formats must be all, none, or names out of {", ".join(conversion.FORMATS)}. '
        f'Received: {unknown[0]!r}.'
      )
    if self.freeze_bn_delay is not None and self.nb_batches_bn:
      raise UserError(
        '--nb_batches_bn estimates moving statistics anew and --freeze_bn_delay keeps them as they '
        f'are: give one of them. Received: {self.nb_batches_bn} and {self.freeze_bn_delay}.'
      )
    for name in (
      'loss_w_dst',
      'tempr_dst',
      'loss_w_dst_features',
      'dst_features',
      'dst_mixup',
      'save_path_dst',
    ):
      default = type(self).__dataclass_fields__[name].default
      if not self.enbl_dst and getattr(self, name) != default:
        raise UserError(
          f'--{name} is about distillation, which is off: add --enbl_dst, or leave it out. '
          f'Received: --{name}={getattr(self, name)}.'
        )
    default = type(self).__dataclass_fields__['dst_features'].default
    if self.dst_features != default and not self.loss_w_dst_features:
      raise UserError(
        '--dst_features has no effect without --loss_w_dst_features. '
        f'Received: --dst_features={self.dst_features}.'
      )

  @property
  def formats(self):
    """The names of the formats to write; None for all that the model has."""
    if self.export_formats == 'all':
      return None
    return [name for name in self.export_formats.split(',') if name and name != 'none']
