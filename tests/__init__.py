"""The tests mirror megatron/, eval_tasks/ and tools/, a folder a package; what several folders use lies here."""
