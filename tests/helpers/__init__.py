"""What several test modules share: tiny real parts, oracles, peers. No test module imports another one.

outside         public data sets, tokenizers and templates, where SFTFLOW_TEST_DATA names them; a skip elsewhere
tiny            text for a tiny tokenizer, a renderer of it
tokenizers      small tokenizers of the kinds that Llama 2, Llama 3.1, Qwen3 and GPT-2 have
architectures   random models of real transformers code, a few layers of 32
adapters        random adapters as peft saves them, and their logits
generation      requests with random prompts; a model that runs out of memory when told to
training        random examples and the settings of a short training loop
templates       small chat templates of our own, and renderers of them
runs            small training runs; the command line, in this process
serving         a served tiny model: in this process, on a loopback port
peer            a server that says what a test wants said
chromium        a real browser, driven without a driver
oracle, shapes  a second opinion on rendered rows; conversations of every shape
judge           every shape through one template and one tokenizer, by the oracle: the outcomes as a table's line
report_data     a complete example of what a report is made from; a strict reader of pages
"""
