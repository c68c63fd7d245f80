"""Whatever a client sends, as the API's own description allows it or not: an answer, and never the server's fault."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from search_r3.retriever import Retriever
from search_r3.serve.app import Served, create_app
from search_r3.serve.settings import Settings
from tests.serve.conftest import running

schemathesis = pytest.importorskip("schemathesis", reason="no fuzzing: pip install schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import response_schema_conformance  # noqa: E402


def test_no_request_is_the_servers_fault(retriever: Retriever) -> None:
    tried = 0
    with running(create_app([Served("manual", retriever)], Settings(timeout=20))) as url:
        for operation in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():

            @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.ok().as_strategy())
            def fuzz(case: Any) -> None:
                nonlocal tried
                tried += 1
                answer = case.call(timeout=20)
                case.validate_response(answer, checks=[not_a_server_error, response_schema_conformance])
                assert answer.elapsed < 15

            fuzz()
    assert tried > 100
