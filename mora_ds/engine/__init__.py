"""All code that depends on DeepSpeed: its configuration, its engine, its internals.

    initialize        a model with MoRA matrices -> a DeepSpeed engine, after checks that need no engine
    ds_config         a DeepSpeed JSON with "auto" values -> the config of the engine; ds_keys, ds_optimizer: its parts
    zero              access to an engine's fp32 master weights, optimizer state, learning rate, gradient norm
    muon              workarounds for DeepSpeed's Muon
    node_base         the frozen base in memory that the ranks of a node share
    layer_prefetcher  copies decoder layers to the device one by one (--base_device host); host_copies: its copies
    module_hooks      removes DeepSpeed's hooks that gather nothing, and makes those of a decoder layer one
    shards            gets and restores, as tensors, what training changes in an engine
    traffic           counts the bytes of collectives
    device            the device of this process
    accelerate        the engine for Hugging Face's Trainer
    launcher          flags and command of DeepSpeed's launcher
    settings          what the settings of a run say about the engine

This file imports no module, because most take seconds to import.
"""
