"""DeepSpeed: the engine that trains one model, its optimizers, its state, its pipeline. No other package imports it."""
