"""ILSVRC-12: photographs in folders by class (Russakovsky et al. 2015, arXiv:1409.0575).

Reads `train/<synset>/*.JPEG` and `val/<synset>/*.JPEG`, with any number of classes. The official
validation photographs come in one folder and must be sorted into synsets first. Photographs stay on
disk: only their names are in memory.
"""

import os
import pathlib

import numpy as np
import tensorflow as tf

from datasets.dataset import IndexedDataset
from pocketsize.errors import UserError

SIZE = 224  # pixels of a side, as the nets get it
SHORT_SIDE = 256  # pixels before the centre is cut out in evaluation
MEAN = (123.68, 116.78, 103.94)  # of red, green and blue in 0 to 255

_FOLDERS = {'train': 'train', 'test': 'val'}
_SUFFIXES = ('.jpeg', '.jpg')
_WHOLE = [[[0.0, 0.0, 1.0, 1.0]]]  # the box of the whole photograph


class Ilsvrc12(IndexedDataset):
  """x [batch, 224, 224, 3] minus the channels' means, y the class's place among the sorted synsets.

  In training a random part of the photograph (5 to 100 % of its area, aspect ratio 3/4 to 1.33) is
  resized and flipped by chance; in evaluation the short side becomes 256 pixels and the centre is
  cut out. Split 'test' is the folder `val`.

  A file that is damaged or no JPEG ends the iteration with a tf.errors.OpError, whose text says
  `UserError: ` and which file. PNG under the name of JPEG is read, as one official photograph is.

  Args:
    folder: of the data, with `train` and `val`; or None, as there is no download.
    nb_smpls_val: training samples that are held out as 'val'.

  Attributes:
    classes: the synsets, sorted.

  Raises:
    UserError: a folder is missing, or has no photographs; says which.
  """

  def __init__(self, folder, nb_smpls_val=10000):
    super().__init__(nb_smpls_val)
    self.classes = class_names(folder)
    self._places = {part: pathlib.Path(folder) / name for part, name in _FOLDERS.items()}
    unknown = sorted({*_folders_in(self._places['test'])} - {*self.classes})
    if unknown:
      raise UserError(
        f'{self._places["test"]} must have no class that the training set has not. Received: '
        f'{", ".join(unknown[:3])}{" ..." if unknown[3:] else ""}.'
      )
    self._files = {part: _files_in(place, self.classes) for part, place in self._places.items()}

  def _count(self, part):
    return len(self._files[part][1])

  def load(self, split, *, batch, shard=(0, 1), seed=0, training=False, start=0):
    if training:
      self.steps_per_epoch(split, batch, shard[1])  # refuses too small a split at once
      length = tf.data.experimental.INFINITE_CARDINALITY

      def choices():
        return self._training_choices(split, batch, shard, seed, start)
    else:
      chosen = self._evaluation_choices(split, batch, shard)
      length = len(chosen)

      def choices():
        return ((each, None) for each in chosen)

    part = 'test' if split == 'test' else 'train'
    names = tf.data.Dataset.from_generator(
      lambda: self._names(part, choices()),
      output_signature=(
        tf.TensorSpec((None,), tf.string),
        tf.TensorSpec((None, 2), tf.int64),
        tf.TensorSpec((None,), tf.int64),
      ),
    )
    return (
      names.unbatch()
      .map(_distorted if training else _central, tf.data.AUTOTUNE, deterministic=True)
      .batch(batch, drop_remainder=training)
      .apply(tf.data.experimental.assert_cardinality(length))
      .prefetch(2)
    )

  def _names(self, part, choices):
    """Yields (paths, seeds of the augmentation, labels) of every batch."""
    files, labels = self._files[part]
    place = os.fsencode(self._places[part])
    for chosen, rng in choices:
      shape = (len(chosen), 2)
      seeds = np.zeros(shape, np.int64) if rng is None else rng.integers(1 << 62, size=shape)
      yield [os.path.join(place, name) for name in files[chosen]], seeds, labels[chosen]


def class_names(folder):
  """Returns the sorted names of the classes: the folders in `train`.

  Args:
    folder: of the data, or None.

  Raises:
    UserError: nothing names a folder, or there is no `train` with folders in it.
  """
  if folder is None:
    raise UserError(
      'ILSVRC-12 has no download that is open to all: give a folder with train/<synset>/*.JPEG and '
      'val/<synset>/*.JPEG with --data_dir_local, POCKETSIZE_DATA_DIR_ILSVRC12 or a line in '
      'path.conf.'
    )
  names = _folders_in(pathlib.Path(folder) / _FOLDERS['train'])
  if not names:
    raise UserError(
      f'The folder of ILSVRC-12 must hold train/<synset>/*.JPEG. Received: {folder}, whose train '
      'has no folders.'
    )
  return names


def _folders_in(place):
  try:
    with os.scandir(place) as entries:
      return sorted(each.name for each in entries if each.is_dir() and each.name[0] != '.')
  except OSError as error:
    raise UserError(
      f'The folder of ILSVRC-12 must hold train/<synset>/*.JPEG and val/<synset>/*.JPEG. Received: '
      f'{place}, which cannot be read: {error.strerror}.'
    ) from error


def _files_in(place, classes):
  """Returns (names relative to `place` as bytes, labels) of the photographs, sorted by class."""
  names, labels = [], []
  for label, name in enumerate(classes):
    folder = place / name
    files = sorted(os.listdir(folder)) if folder.is_dir() else []
    files = [each for each in files if each.lower().endswith(_SUFFIXES) and each[0] != '.']
    if not files and place.name == _FOLDERS['train']:
      raise UserError(f'{folder} must have photographs, *.JPEG or *.jpg. Received: none of them.')
    names += [os.fsencode(f'{name}/{each}') for each in files]
    labels += [label] * len(files)
  if not names:
    raise UserError(
      f'{place} must have photographs, <synset>/*.JPEG or *.jpg. Received: none of them.'
    )
  # As bytes of one length: 40 MB for the 1.28 million names of the whole training set.
  return np.array(names), np.array(labels, np.int64)


def _decode(path):
  """Returns the pixels of a file, [height, width, 3] uint8."""
  try:
    # TensorFlow's default transform is no faster, and a level darker in places.
    content = tf.io.read_file(path)
    return tf.io.decode_jpeg(content, channels=3, dct_method='INTEGER_ACCURATE').numpy()
  except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError) as error:
    raise UserError(
      f'{os.fsdecode(path)} must be a whole JPEG photograph. Received: a file that is none, is '
      'damaged or is gone.'
    ) from error


def _pixels(path):
  # Python knows which file it is when decoding fails; decoding itself does not hold its lock.
  pixels = tf.numpy_function(_decode, [path], tf.uint8, stateful=False)
  return tf.ensure_shape(pixels, (None, None, 3))


def _distorted(path, seed, label):
  """(x, y) of one training sample, a pure function of `seed`."""
  pixels = _pixels(path)
  begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.shape(pixels),
    _WHOLE,
    seed,
    min_object_covered=0.1,
    aspect_ratio_range=(0.75, 1.33),
    area_range=(0.05, 1.0),
    max_attempts=100,
  )
  x = tf.image.resize(tf.slice(pixels, begin, size), (SIZE, SIZE))
  # The box was drawn from `seed` itself: another one for the flip.
  x = tf.image.stateless_random_flip_left_right(x, seed + 1)
  return tf.ensure_shape(x, (SIZE, SIZE, 3)) - MEAN, label


def _central(path, seed, label):
  """(x, y) of one evaluation sample."""
  del seed
  pixels = _pixels(path)
  shape = tf.cast(tf.shape(pixels)[:2], tf.float32)
  sides = tf.round(shape * SHORT_SIDE / tf.reduce_min(shape))
  x = tf.image.resize(pixels, tf.cast(sides, tf.int32))
  return tf.image.resize_with_crop_or_pad(x, SIZE, SIZE) - MEAN, label
