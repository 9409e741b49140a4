"""Transfer learning with 8-bit weights and activations, in a training script of one's own.

So that nothing is downloaded, MobileNetV2 has random weights here and batch norm statistics from
one
batch: a stand-in for weights='imagenet'.
"""

import argparse
import pathlib

import keras
import numpy as np
from sklearn.datasets import load_digits

import pocketsize
from pocketsize import conversion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--epochs', type=int, default=3, help='of each of the two trainings')
parser.add_argument('--samples', type=int, default=1797, help='how many of the digits to use')
parser.add_argument('--output_dir', type=pathlib.Path, default='runs/transfer_learning')
args = parser.parse_args()

keras.utils.set_random_seed(0)
images, labels = (array[: args.samples] for array in load_digits(return_X_y=True))
images = (
  np.kron(images.reshape(-1, 8, 8, 1), np.ones((4, 4, 3))).astype('float32') / 8 - 1
)  # 32x32x3, -1 to 1
cut = len(images) * 4 // 5
x, y, test_x, test_y = images[:cut], labels[:cut], images[cut:], labels[cut:]


def train(model, learning_rate, **options):
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=['accuracy'])
  model.fit(x, y, epochs=args.epochs, batch_size=64, verbose=2, **options)
  return model.evaluate(test_x, test_y, verbose=0)[1]


# The stand-in for a pretrained base; images of 32 pixels leave nothing to see for the later blocks.
mobilenet = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, include_top=False, weights=None)
for layer in mobilenet.layers:
  if isinstance(layer, keras.layers.BatchNormalization):
    layer.momentum = 0.0
mobilenet(x[:256], training=True)
base = keras.Model(mobilenet.input, mobilenet.get_layer('block_3_expand_relu').output, name='base')

# A frozen base and a new head, trained in float.
base.trainable = False
inputs = keras.Input((32, 32, 3))
features = keras.layers.Flatten()(base(inputs, training=False))
model = keras.Model(inputs, keras.layers.Dense(10, name='head')(features))
print(f'float model: {train(model, 1e-3):.4f}')

# The same model, quantized and trained on. Frozen layers stay frozen, batch norm statistics too.
compressed, stack = pocketsize.compress(
  model, [{'algorithm': 'uniform'}], calibration=[x[:64], x[64:128]]
)
accuracy = train(compressed, 1e-4, callbacks=[pocketsize.CompressionCallback(stack)])
print(f'quantized model: {accuracy:.4f}')

args.output_dir.mkdir(parents=True, exist_ok=True)
pocketsize.strip(compressed).save(args.output_dir / 'final.keras')
for file in pocketsize.export(
  compressed, args.output_dir, formats=('tflite', 'tflite_int8'), name='mobilenet'
):
  outputs = conversion.open_file(file.path)(test_x)[0]
  print(
    f'{file.format}: {np.mean(outputs.argmax(axis=1) == test_y):.4f}, '
    f'{file.path.stat().st_size} bytes'
  )
