"""Transfer learning, then 8 bits, without flags: a MobileNetV2 base with a new head, on the digits.

    ./scripts/run_local.sh examples/transfer_learning.py --output_dir=exports

The base stands for a downloaded one: random weights, batch norms with statistics of real images.
"""

import argparse

import keras
import numpy as np
from sklearn import datasets

import pocketsize

parser = argparse.ArgumentParser()
parser.add_argument('--output_dir', default='exports')
parser.add_argument('--epochs', type=int, default=5)
args = parser.parse_args()
keras.utils.set_random_seed(0)

images, labels = datasets.load_digits(return_X_y=True)
images = np.kron(images.reshape(-1, 8, 8, 1), np.ones((4, 4, 3))).astype('float32') / 8 - 1
x, y, test_x, test_y = images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(model, learning_rate, callbacks=()):
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=['accuracy'])
  model.fit(x, y, batch_size=64, epochs=args.epochs, verbose=2, callbacks=list(callbacks))
  return model.evaluate(test_x, test_y, verbose=0)[1]


mobilenet = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, include_top=False, weights=None)
for layer in mobilenet.layers:
  layer.momentum = 0.0  # of the batch norms: one batch sets their statistics
mobilenet(x[:256], training=True)
base = keras.Model(mobilenet.input, mobilenet.get_layer('block_3_expand_relu').output, name='base')
base.trainable = False

inputs = keras.Input((32, 32, 3))
features = keras.layers.Flatten()(base(inputs, training=False))
model = keras.Model(inputs, keras.layers.Dense(10, name='head')(features))
print(f'float model: {train(model, 1e-3):.4f}')

# Frozen layers stay frozen, and their batch norms keep their statistics.
config = [{'algorithm': 'uniform', 'weight_bits': 8, 'activation_bits': 8}]
model, stack = pocketsize.compress(model, config, calibration=[x[:128]])
accuracy = train(model, 1e-4, [pocketsize.CompressionCallback(stack)])
print(f'quantized model: {accuracy:.4f}')

for file in pocketsize.export(model, args.output_dir, ('tflite', 'tflite_int8'), 'mobilenet'):
  outputs = pocketsize.conversion.open_file(file.path)(test_x)[0]
  accuracy = np.mean(outputs.argmax(axis=1) == test_y)
  print(f'{file.format}: {accuracy:.4f}, {file.path.stat().st_size} bytes')
pocketsize.strip(model).save(f'{args.output_dir}/final.keras')
