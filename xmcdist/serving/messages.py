"""Requests and answers: their shape in OpenAPI, and the check of what a client sends.

A body is read by pydantic's own JSON parser, in one pass: it knows no NaN in a whole
number, no half surrogate pair and no nesting without end, each of which would otherwise
have to be caught one by one.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, create_model

from xmcdist.serving.faults import Fault
from xmcdist.serving.limits import Limits

__all__ = ["Answer", "Asked", "Health", "Info", "Problem", "Ready", "asked_type", "parse"]

_EXAMPLE = "terminal program that shows the weather forecast"


class Asked(Protocol):
    """A request for predictions, checked."""

    texts: list[str]
    k: int | None
    beam: int | None
    labels: list[int] | None


class Label(BaseModel):
    """One label of an answer."""

    model_config = ConfigDict(extra="forbid")
    label: str = Field(description="text of the label")
    id: int = Field(description="its number, from 0", ge=0)
    score: float = Field(description="what labels are ordered by; larger is better")
    probability: float | None = Field(
        None, ge=0, le=1, description="that the label is right; there where the model is calibrated"
    )


class Answer(BaseModel):
    """Predictions, in the order of the texts."""

    model_config = ConfigDict(extra="forbid")
    predictions: list[list[Label]] = Field(description="the best labels of each text, best first")
    model: str = Field(description="the model folder's name")
    took_ms: float = Field(ge=0, description="from the request's last byte to the answer, milliseconds")


class Error(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")
    type: str = Field(description="a short name for programs")
    message: str = Field(description="what is wrong and what to do, for people")
    field: str | None = Field(None, description="the field of the request that is wrong")


class Problem(BaseModel):
    """The body of every answer that is no success."""

    model_config = ConfigDict(extra="forbid")
    error: Error


class Health(BaseModel):
    """The process answers."""

    model_config = ConfigDict(extra="forbid")
    status: str = Field(examples=["alive"])


class Ready(BaseModel):
    """The model is open and its compiled loops are warm."""

    model_config = ConfigDict(extra="forbid")
    status: str = Field(examples=["ready"])


class Info(BaseModel):
    """What is served."""

    model_config = ConfigDict(extra="forbid")
    model: str
    models: list[str] = Field(description="the folders' names, several for an ensemble")
    ensemble: str | None = Field(description="how several models answer as one")
    labels: int
    names_labels: bool = Field(description="whether labels have texts, not only numbers")
    levels: list[int] = Field(description="clusters of each level of the label tree, then its leaves")
    beam: int = Field(description="clusters kept a level where a request names no beam")
    encoder: bool = Field(description="whether a transformer reads the texts, beside or instead of TF-IDF")
    trained_on: int | None = Field(description="documents")
    calibration: str | None = Field(description="how probabilities were fitted; null: there are none")
    versions: dict[str, str] = Field(description="of the programs that serve, and of xmcdist when it trained")
    limits: dict[str, float]


def _whole(value: Any) -> Any:
    """5.0 is a whole number in JSON Schema, and some programs write all numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)


def asked_type(limits: Limits, num_labels: int) -> type[BaseModel]:
    """The model of a request, with the limits in it, so that OpenAPI tells them."""
    text = Annotated[str, StringConstraints(max_length=limits.max_characters)]
    label = Annotated[int, Field(ge=0, le=max(num_labels - 1, 0)), _WHOLE]
    fields: dict[str, Any] = {
        "texts": (
            list[text],
            Field(
                min_length=1,
                max_length=limits.max_documents,
                description="documents; of one without a known word the labels that are common come back",
                examples=[[_EXAMPLE]],
            ),
        ),
        "k": (
            Annotated[int, Field(ge=1, le=limits.max_k), _WHOLE] | None,
            Field(None, description="labels a document; null: 5, or all of labels", examples=[5]),
        ),
        "beam": (
            Annotated[int, Field(ge=1, le=limits.max_beam), _WHOLE] | None,
            Field(None, description="clusters kept a level; more is slower and finds more; null: as trained"),
        ),
        "labels": (
            Annotated[list[label], Field(min_length=1, max_length=limits.max_k)] | None,
            Field(None, description="score these label ids and no others, however poor; beam is then nothing"),
        ),
    }
    config = ConfigDict(strict=True, extra="forbid", title="Asked")
    return create_model("Asked", __config__=config, **fields)


def parse(body: bytes, asked: type[BaseModel]) -> Asked:
    """The checked request.

    Raises:
        Fault: 400 for what is no JSON, 422 for what is not as `asked_type` describes.
    """
    try:
        return cast(Asked, asked.model_validate_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Fault(400, "not_json", f"the body is no JSON in UTF-8 ({first['msg']})") from None
        where = [part for part in first["loc"] if not str(part).startswith("constrained-")]
        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}"[:100] for p in where).lstrip(".")
        if first["type"] == "extra_forbidden":
            names = ", ".join(asked.model_fields)
            raise Fault(422, "unknown_field", f"there is no field {field!r}; there are: {names}", field=field) from None
        what = first["msg"][:1].lower() + first["msg"][1:]
        told = f"{field}: {what}" if field else f'{what}; send {{"texts": ["..."]}}'
        raise Fault(422, "invalid_value", told, field=field or None) from None
