"""The terminal chat: `repl_input` reads what is typed, `repl` answers, `save` writes it down."""
