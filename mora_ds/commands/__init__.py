"""The command line: `mora-ds COMMAND`, `python -m mora_ds COMMAND`. Each module is one
command and has its `main`.

dispatch        the table of commands; starts one of them
pretrain        training, in this process or by DeepSpeed's launcher
recipes         the recipes and DeepSpeed files of the package
plan                                before a run: memory and traffic
prepare_corpus, extend_vocab        text and vocabulary
export, convert, evaluate           what a checkpoint is good for
ledger, verify                      what a checkpoint holds
analyze, spectrum, evaluate_adapters    front ends of `mora_ds.research`

The programs in launch/ and tools/ call the same functions from a checkout.
"""
