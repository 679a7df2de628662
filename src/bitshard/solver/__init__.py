"""The GPTQ solve: arrays in, a QuantizedWeight out. No module, no file, no packed layout, no kernel is known here."""
