"""The schema that is published is the one that the reports' dataclasses make."""

import jsonschema

from tests.helpers.command import SCHEMA
from tools.schema import schema


def test_the_published_schema_is_that_of_the_code():
    assert schema() == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
