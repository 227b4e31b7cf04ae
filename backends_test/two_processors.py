"""What travels between host and GPU in a step on TensorFlow, without a GPU.

A second CPU of TensorFlow's stands for it. The argument is the softmax; JSON
on stdout has the operations whose results go `there` and `back`.
"""

import json
import sys

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

_STEP = "StatefulPartitionedCall/"  # not of the loop around steps

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)

# TensorFlow divides a CPU only before anything is computed.
import multilstm  # noqa: E402

with tf.device("CPU:1"):
    model = multilstm.LanguageModel(
        50,
        units=8,
        input_dropout=0.5,
        output_dropout=0.5,
        embedding_dropout=0.1,
        weight_dropout=0.5,
        softmax=sys.argv[1],
    )
    model.compile()
    batches = multilstm.ContinuousStreams(
        np.arange(400) % 50,
        sequence_length=5,
        batch_size=4,
        drop_remainder=True,
    )
    context.context().enable_run_metadata()
    model.fit(batches, verbose=0)

found: dict[str, list[str]] = {"there": [], "back": []}
for function in context.context().export_run_metadata().function_graphs:
    for graph in function.partition_graphs:
        operations = {node.name: node.op for node in graph.node}
        for node in graph.node:
            if node.op != "_Send" or _STEP not in node.name:
                continue
            [source] = node.input
            if "/ctrl/" in source:
                continue  # of the order of operations
            ends_on_host = node.attr["recv_device"].s.endswith(b"CPU:0")
            way = "back" if ends_on_host else "there"
            found[way].append(operations[source])
print(json.dumps({way: sorted(names) for way, names in found.items()}))
