"""The main job: from settings to a trained and exported model. It may use every other
package.

pretrain        the pipeline from settings to a summary; demo runs it twice
dry_run         --dry_run: the plan of a job in place of the job
setup           processes that start together, DeepSpeed config, and what a run starts from
output_folder   --output_dir: which run may write into it, and what of it is a run's; run_file: run.yaml
data            files -> tokens -> batches; tokenizer: which one
inputs          what a run reads, and that none of it lies where it writes
base            the base model: where from, on the device or in host memory
job             what a run trains: an adapter, every parameter, or nothing
run             `mora_ds.Run`: resumes, merges, saves and exports, for loops written by users too
preflight       every check of the live model before the first step
trainer         the loop; loader: its batches, and who computes which rows; evaluator
metrics         step lines, metrics.jsonl, TensorBoard
"""
