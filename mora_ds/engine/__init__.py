"""Everything that touches DeepSpeed: its configuration, its engine, its internals.

    initialize        a model with MoRA matrices -> a DeepSpeed engine, after the checks that need no engine
    ds_config         a DeepSpeed JSON with "auto" values -> the config of the engine; ds_keys, ds_optimizer: its parts
    zero              what other packages ask an engine: masters, optimizer state, learning rate, gradient norm
    muon              what DeepSpeed's Muon needs besides
    shards            takes, writes, reads and restores the shards of a checkpoint
    traffic           counts the bytes that collectives carry
    device            the device of this process
    settings          what the settings of a run say about the engine

It imports none of them itself, as most take seconds to import.
"""
