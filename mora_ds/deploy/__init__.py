"""An adapter outside its run: merged models and exported adapters.

export          `export_merged`: checkpoint -> a merged Hugging Face folder
peft_export     `export_peft`: a checkpoint as a LoRA adapter of PEFT
combine         `combine_adapters`: weighted sums of adapters, and scaled updates
onto            which other models an update may be put onto
fork_adapters   adapters of kongds's PEFT, read as ours
hub             uploads models and adapters to the Hugging Face Hub
logits_check    compares an export's logits with the live model's
model_card      README.md of an export
adapter_io      `export_adapter`, `load_adapter`: an adapter alone, and put onto its base
"""
