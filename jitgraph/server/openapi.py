"""The description of the interface, OpenAPI 3.1, made from the records that requests are decoded into. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from jitgraph.server.openai import replies, schema
from jitgraph.server.openai.errors import ErrorResponse
from jitgraph.version import VERSION

_PREFIX = "#/components/schemas/{name}"
_FAILURES = {
    "400": "The request is wrong; ``param`` names the field.",
    "401": "No API key, or a wrong one.",
    "403": "Another site's page asks with the password that a browser keeps, or by a name that is not this server's.",
    "404": "No such model or route.",
    "405": "The route exists and takes another method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "422": "The answer was not done in the time that the server gives it.",
    "429": "The queue is full; Retry-After says when to ask again.",
    "431": "Too many headers, or too large ones.",
    "500": "A defect of the server or of the checkpoint.",
    "503": "No engine takes requests now; Retry-After says when to ask again.",
}
_OF_ALL: tuple[str, ...] = ("401", "404", "405", "431", "500")
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""One event of a stream; its data is JSON, or ``[DONE]``."""
_POSTS: tuple[tuple[str, str, type, type, bool], ...] = (
    ("/v1/chat/completions", "Answer a conversation", schema.ChatRequest, replies.ChatReply, True),
    ("/v1/completions", "Continue a text", schema.CompletionRequest, replies.CompletionReply, True),
    ("/tokenize", "Text or a conversation to token ids", schema.TokenizeRequest, replies.Tokenized, False),
    ("/detokenize", "Token ids to text", schema.DetokenizeRequest, replies.Detokenized, False),
)
_GETS: tuple[tuple[str, str, type | None, tuple[str, ...]], ...] = (
    ("/v1/models", "The models", replies.ModelList, (*_OF_ALL, "503")),
    ("/v1/models/{model}", "One model", replies.Model, (*_OF_ALL, "503")),
    ("/health", "Whether server and engine live", replies.Status, ("431", "500", "503")),
    ("/ready", "Whether requests are taken", replies.Status, ("431", "500", "503")),
    ("/version", "Versions", replies.Version, _OF_ALL),
    ("/metrics", "Metrics for Prometheus", None, _OF_ALL),
    ("/openapi.json", "This description", None, _OF_ALL),
)


def description() -> dict[str, Any]:
    """The whole document."""
    records = [record for _, _, request, reply, _ in _POSTS for record in (request, reply)]
    records += [reply for _, _, reply, _ in _GETS if reply is not None]
    records.append(ErrorResponse)
    schemas, components = msgspec.json.schema_components(records, schema_hook=_schema_of, ref_template=_PREFIX)
    of = dict(zip(records, schemas, strict=True))
    paths: dict[str, Any] = {}
    for path, summary, request, reply, streams in _POSTS:
        answer: dict[str, Any] = {"application/json": {"schema": of[reply]}}
        if streams:
            answer["text/event-stream"] = {"schema": _EVENT}
        failures: tuple[str, ...] = (*_OF_ALL, "400", "403", "408", "413", "415", "422", "429", "503")
        body = {"required": True, "content": {"application/json": {"schema": of[request]}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, **_responses(answer, failures, of)}}
    for path, summary, found, failures in _GETS:
        kind = "text/plain" if path == "/metrics" else "application/json"
        answer = {kind: {"schema": {} if found is None else of[found]}}
        paths[path] = {"get": {"summary": summary, **_responses(answer, failures, of)}}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"]["get"]["parameters"] = [name]
    for path in ("/health", "/ready"):
        paths[path]["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {"title": "jitgraph", "version": VERSION, "description": "OpenAI's interface to one model."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "password": {"type": "http", "scheme": "basic", "description": "Any name; the key as password."},
            },
        },
        "security": [{}, {"key": []}, {"password": []}],
    }


def _responses(answer: dict[str, Any], failures: tuple[str, ...], of: dict[Any, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": of[ErrorResponse]}}
    found: dict[str, Any] = {"200": {"description": "The answer.", "content": answer}}
    for status in sorted(failures):
        found[status] = {"description": _FAILURES[status], "content": error}
    return {"responses": found}


def _schema_of(kind: type) -> dict[str, Any]:
    """JSON that is kept as bytes may be anything."""
    if kind is msgspec.Raw:
        return {}
    raise NotImplementedError
