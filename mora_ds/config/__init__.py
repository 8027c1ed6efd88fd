"""Settings of a run: flags and recipes, parsed strictly, and every check that needs no
file's contents.

flags               command line and YAML -> dataclasses
arguments           `Arguments`: the five groups of settings, `parse` and `dump`
effects             which settings have an effect together with which
adapter             settings of the adapter and its merges
data                settings of model, tokenizer and text
training            settings of the run itself
lr_schedule         the learning rate of every step, its settings, and the steps at which a merge may come
mixture             sources of text with weights: flags and mix.yaml
forgetting          bounds and weights that are applied after every evaluation
research            the block `research:` of a recipe
validate            all checks, reported together

None of them imports torch, transformers or DeepSpeed at its top: `--help` and a wrong flag wait
for none of these.
"""
