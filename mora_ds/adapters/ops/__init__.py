"""Pure tensor functions and the specs that say what an adapter's trained tensor means;
no modules, no models.

spec               `UpdateSpec`, the interface of all specs, `AdditiveSpec`; names of operators, sizes, seeds
mora               `OperatorSpec`: truncate, share, decouple, rotate
lora               `LoRASpec`: LoRA's two factors
stack              `StackSpec`: one operator for all experts of a projection
grouped            products of rows with the matrices of a stack
linear             an adapted layer's product, over activations or over the weight, with its gradients
updates            several updates, merged into a weight or added to what a layer computes
index_tables       the four maps of an operator: fold, unfold, spread, collect
frozen             a frozen weight and its products, dense or quantized
int8               frozen weights in 8 bits
"""
