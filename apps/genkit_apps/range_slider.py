"""A range slider with two thumbs on a logarithmic axis, which Gradio does not have: two native sliders and two number fields."""

from __future__ import annotations

from typing import Any

import gradio as gr

_HTML = """
<fieldset class="gk-range">
  <legend>${label}</legend>
  <div class="gk-track">
    <div class="gk-fill"></div>
    <input type="range" dir="rtl" class="gk-high" min="0" max="1000" step="1" aria-label="${label}: upper end">
    <input type="range" dir="rtl" class="gk-low" min="0" max="1000" step="1" aria-label="${label}: lower end">
  </div>
  <div class="gk-ticks" aria-hidden="true"></div>
  <div class="gk-numbers">
    <label>upper end <input type="number" class="gk-high-number" min="0" max="${max}" step="any"></label>
    <label>lower end <input type="number" class="gk-low-number" min="0" max="${max}" step="any"></label>
    <output class="gk-told"></output>
  </div>
</fieldset>
"""

_CSS = """
.gk-range { border: 1px solid var(--border-color-primary); margin: 0; padding: .5rem .75rem; border-radius: 6px;
  background: var(--block-background-fill); }
.gk-range legend { font-size: var(--block-label-text-size, .875rem); color: var(--body-text-color); float: left; width: 100%; }
.gk-track { position: relative; height: 2rem; clear: both; }
.gk-track::before { content: ""; position: absolute; left: 9px; right: 9px; top: 13px; height: 6px; border-radius: 3px;
  background: #94a3b8; }
.gk-fill { position: absolute; top: 13px; height: 6px; background: #4f46e5; border-radius: 3px; }
.gk-track input { position: absolute; inset: 0; width: 100%; height: 2rem; margin: 0; background: none; pointer-events: none;
  -webkit-appearance: none; appearance: none; outline: none; }
.gk-track input::-webkit-slider-runnable-track { background: none; height: 2rem; }
.gk-track input::-webkit-slider-thumb { -webkit-appearance: none; pointer-events: auto; width: 18px; height: 24px;
  margin-top: 4px; border-radius: 5px; border: 2px solid #fff; background: #4f46e5; box-shadow: 0 0 0 1px #312e81;
  cursor: ew-resize; }
.gk-track input::-moz-range-track { background: none; }
.gk-track input::-moz-range-thumb { pointer-events: auto; width: 14px; height: 20px; border-radius: 5px; border: 2px solid #fff;
  background: #4f46e5; box-shadow: 0 0 0 1px #312e81; cursor: ew-resize; }
.gk-track input:focus-visible::-webkit-slider-thumb { box-shadow: 0 0 0 3px #f59e0b; }
.gk-track input:focus-visible::-moz-range-thumb { box-shadow: 0 0 0 3px #f59e0b; }
.gk-ticks { position: relative; height: 1.1rem; margin: 0 9px; font-size: .72rem; color: var(--body-text-color); }
.gk-ticks span { position: absolute; transform: translateX(-50%); }
.gk-numbers { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; font-size: .8rem;
  color: var(--body-text-color); }
.gk-numbers input { width: 5.5rem; padding: .15rem .4rem; border: 1px solid #94a3b8; border-radius: 4px; font-size: .8rem;
  background: var(--input-background-fill); color: var(--body-text-color); }
"""

_JS = """
const [MIN, MAX, N] = [props.min, props.max, 1000];
const find = name => element.querySelector(name);
const low = find('.gk-low'), high = find('.gk-high'), lowNumber = find('.gk-low-number'), highNumber = find('.gk-high-number');
const place = v => v <= MIN ? 0 : Math.round(N * Math.log(Math.min(v, MAX) / MIN) / Math.log(MAX / MIN));
const level = p => p <= 0 ? 0 : p >= N ? MAX : Number((MIN * (MAX / MIN) ** (p / N)).toPrecision(3));
const across = p => `calc(9px + ${1 - p / N} * (100% - 18px))`;
let now = [0, MAX];
function show() {
  const [a, b] = now.map(place);
  low.value = a; high.value = b; lowNumber.value = now[0]; highNumber.value = now[1];
  low.setAttribute('aria-valuetext', `sigma ${now[0]}`); high.setAttribute('aria-valuetext', `sigma ${now[1]}`);
  low.style.zIndex = a > N / 2 ? 3 : 2; high.style.zIndex = a > N / 2 ? 2 : 3;
  const fill = find('.gk-fill');
  fill.style.left = across(b); fill.style.right = `calc(9px + ${a / N} * (100% - 18px))`;
  find('.gk-told').textContent = `acts where ${now[0]} < sigma \\u2264 ${now[1]}`;
}
function take(value) {
  if (Array.isArray(value) && value.length === 2 && value.every(v => Number.isFinite(Number(v)))) now = value.map(Number);
  show();
}
let waiting, count = 0;
function commit() {  // arrow keys come in bursts
  clearTimeout(waiting);
  waiting = setTimeout(() => { props.value = [...now, ++count]; trigger('release'); }, 250);
}
for (const [input, own] of [[low, 0], [high, 1]]) {
  input.addEventListener('input', () => {
    const at = level(Number(input.value));
    now = own ? [now[0], Math.max(at, now[0])] : [Math.min(at, now[1]), now[1]];
    show();
  });
  input.addEventListener('change', commit);
}
for (const [input, own] of [[lowNumber, 0], [highNumber, 1]]) {
  input.addEventListener('change', () => {
    const at = Math.min(Math.max(Number(input.value) || 0, 0), MAX);
    now = own ? [Math.min(now[0], at), at] : [at, Math.max(now[1], at)];
    show(); commit();
  });
}
const ticks = find('.gk-ticks');
for (const v of props.ticks) {
  const tick = document.createElement('span');
  tick.textContent = v; tick.style.left = `${100 * (1 - place(v) / N)}%`;
  ticks.append(tick);
}
// Its own values, which have a third entry, come back late on a busy machine, when the ends may have moved on.
watch('value', () => {
  if (props.value?.length === 3) return;
  clearTimeout(waiting); take(props.value);
});
take(props.value);
"""


def range_slider(
    value: tuple[float, float] = (0.0, 80.0),
    *,
    label: str = "",
    minimum: float = 0.002,
    maximum: float = 80.0,
    ticks: tuple[float, ...] = (80, 10, 1, 0.1, 0.01, 0),
    **more: Any,
) -> gr.HTML:
    """Two thumbs for ``[low, high]``, large levels on the left. ``.release(...)`` tells that the user has moved one.

    The value is then ``[low, high, count]``: the third entry marks what the thumbs themselves have set.

    It is no subclass: of those Gradio writes an interface file beside the source when they are imported.

    Args:
        value: (low, high).
        minimum: the smallest level above 0 that the thumbs reach; the end of the axis is 0 itself.
        maximum: the largest.
        ticks: levels written below the axis.
        more: for ``gr.HTML``, such as ``elem_id``.
    """
    shape: dict[str, Any] = {"html_template": _HTML, "css_template": _CSS, "js_on_load": _JS, "apply_default_css": False}
    found = gr.HTML(list(value), label=label, **shape, min=minimum, max=maximum, ticks=list(ticks), **more)
    found.api_info = lambda: {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}
    found.example_payload = found.example_value = lambda: list(value)
    return found


__all__ = ["range_slider"]
