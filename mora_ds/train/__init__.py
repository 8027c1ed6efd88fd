"""The main job: from settings to a trained and exported model. This package may import
every other one.

pretrain        the pipeline from settings to a summary; demo runs it twice
dry_run         --dry_run: logs the plan of a run instead of running it
start_up        error handling of the start: an error of one rank ends all ranks
setup           start of the ranks, DeepSpeed config, and the context of a run
output_folder   --output_dir: reservation, and names of its files; run_file: run.yaml
remote_folder   --output_dir at a URL: what is uploaded, and the lease
data            files -> tokens -> batches; tokenizer: the tokenizer of a run
inputs          check that a run does not overwrite its inputs
base            the base model, on the device or in host memory
training_setup  sets up the training of an adapter, of all parameters, or of nothing
run             `mora_ds.Run`: resume, merge, save and export, also for users' own loops
preflight       checks of the model before the first step
trainer         the training loop; replica: ranks of one sequence; profile: --profile
evaluator       evaluations during training; tasks: those of the lm-eval harness
metrics         step lines and metrics.jsonl; trackers: TensorBoard, Weights & Biases
screen          what a person reads before the first step and after the last one
non_fatal       contexts for evaluations and checks, and for failures that do not end the run
"""
