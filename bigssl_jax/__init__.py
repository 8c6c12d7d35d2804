"""BigSSL in JAX: semi-supervised speech recognition at any scale.

A recipe is a chain of stages; a stage trains (or runs) objectives over streams of a corpus; an
objective is a loss on top of one shared Conformer encoder:

    corpus --stream--> batch --encoder--> frames --objective--> loss
    pretrain -> finetune (teacher) -> pseudo_label -> finetune (student) -> evaluate

Importing this package imports nothing heavy and starts no JAX backend; the rooms
(`bigssl_jax.audio`, `.data`, `.models`, `.objectives`, `.decoding`, `.parallel`, `.training`,
`.stages`, `.evaluation`) are imported by name when they are used.
"""

__version__ = '0.1.0'
