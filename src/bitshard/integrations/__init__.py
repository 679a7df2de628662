"""bitshard inside other people's engines. Each module imports its engine; nothing else in the package does."""
