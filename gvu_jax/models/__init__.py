"""One architecture per file; nothing here knows of methods, prompts as text, or files."""
