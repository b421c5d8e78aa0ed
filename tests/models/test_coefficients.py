"""What is shown of coefficients."""

from safegene_trl.models.coefficients import by_component
from safegene_trl.reporting.html import render

from ..reporting.test_html import report_of


def test_coefficients_by_component_and_means_of_rank_one_parts():
    assert by_component({"layers.1": 0.5, "layers.2": 0.0}) == {"": {"layers.1": 0.5, "layers.2": 0.0}}
    assert by_component({"layers.1/0": 0.5, "layers.1/1": 0.2}) == {"0": {"layers.1": 0.5}, "1": {"layers.1": 0.2}}
    parts = {"a.up_proj/0#0": 0.2, "a.up_proj/0#1": 0.4, "a.up_proj/1#0": 1.0, "b.up_proj/0#0": 0.0}
    found = by_component(parts)
    assert list(found) == ["0", "1"] and found["1"] == {"a.up_proj": 1.0}
    assert found["0"] == {"a.up_proj": (0.2 + 0.4) / 2, "b.up_proj": 0.0}
    assert by_component({"a#0": 1.0, "a#1": 2.0}) == {"": {"a": 1.5}}


def test_the_page_draws_a_bar_per_module():
    parts = {f"{name}#{part}": 0.25 * part for name in ("a.up_proj", "b.up_proj") for part in range(4)}
    page = render(report_of(coefficients=parts))
    assert page.count('<rect class="bar"') == 2
    assert "2 means of rank-one parts' coefficients between 0 and 1.00, mean 0.38" in page.replace("&#39;", "'")
    assert page.count("<code>a.up_proj#") == 4  # the table has them all
