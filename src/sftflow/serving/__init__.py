"""An OpenAI-compatible server and a chat page.

The way of one streamed reply, file by file; everything else stands beside it:

    uvicorn_limits   the socket and its connections: how many, how long each may take
    middleware       who may ask (with `host_check`), what is logged and counted (`metrics`)
    api              the address's route
    request_body     bytes -> JSON, in a thread
    schemas          JSON -> ChatBody or CompletionBody
    chat             ChatBody -> ResponseShape: what is asked of the engine, and how its replies will look
      prompt         its messages -> the exact ids -> requests to the engine        (completions: plain prompts)
                     (`joining`: what a format cannot order; `template_arguments`)
      structured     what the reply must be -> a grammar
    engine_thread    requests -> the line -> the engine's scheduler -> deltas, back on the event loop
    responses        deltas -> chunks (ChatChoice in `chat`, with `logprobs`) -> server-sent events, or one JSON object

`service` is the whole, until Ctrl-C or beside a program.
`tokens` answers without the engine (/v1/render, /tokenize, /detokenize). `model_entry` is a model under its name.
Whatever goes wrong is an `errors.ApiError`.
"""
