"""Talking in the terminal: `repl_input` reads what is typed, `repl` answers, `save` writes it down as a row."""
