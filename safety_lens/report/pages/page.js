"use strict";
// The neuron page: pick-lists and a table choose a column (a neuron, head or direction), circuitsvis draws its value at
// every token. All text enters through textContent, except tokens, which circuitsvis puts in as HTML (see `inert`).
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const DIRECTIONS = "directions";
  const ALL = "all";
  const NEGATIVE = "#d55e00";
  const POSITIVE = "#0072b2";

  const steps = new Int16Array(Uint8Array.from(atob(page.values), (c) => c.charCodeAt(0)).buffer);
  const ends = [];
  page.prompts.forEach((prompt, i) => ends.push((i ? ends[i - 1] : 0) + prompt.tokens.length));
  const total = ends[ends.length - 1];
  const valuesOf = (column, i) => {
    const first = column * total + (i ? ends[i - 1] : 0);
    const unit = page.columns[column].step;
    return Array.from(steps.subarray(first, first + page.prompts[i].tokens.length), (v) => v * unit);
  };
  const shown = (x) => {
    const digits = Number(x).toPrecision(3);
    return digits.includes("e") ? digits : String(Number(digits));
  };
  const body = (column, i) => valuesOf(column, i).slice(page.prompts[i].start);
  const highest = (column, i) => Math.max(...body(column, i));
  const strongest = (column, i) => Math.max(...body(column, i).map(Math.abs));
  const lowest = (column, i) => Math.min(...body(column, i));

  const make = (tag, text, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    if (text !== null) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const fill = (id, options) => {
    const before = $(id).value;
    $(id).replaceChildren(...options.map(([value, text]) => make("option", text, { value })));
    if (options.some(([value]) => String(value) === before)) $(id).value = before;
  };

  // --- pick-lists ---------------------------------------------------------------------------------------------------
  const inGroup = (column) => {
    const wanted = $("group").value;
    if (wanted === DIRECTIONS) return column.kind === "direction";
    if (column.kind === "direction") return false;
    return wanted === ALL || Object.hasOwn(column.member, page.groups[Number(wanted)]);
  };
  const everyColumn = page.columns.map((_, c) => c);
  const inLayer = (column, layer) => layer === ALL || column.layer === Number(layer);
  const listed = (layer) => everyColumn.filter((c) => inGroup(page.columns[c]) && inLayer(page.columns[c], layer));
  const ranked = (columns) => {
    const by = page.scores[0];
    const scored = (c) => by !== undefined && Object.hasOwn(page.columns[c].scores, by);
    const size = (c) => (scored(c) ? Math.abs(page.columns[c].scores[by]) : -1);
    const kind = (c) => ["neuron", "head", "direction"].indexOf(page.columns[c].kind);
    return [...columns].sort((a, b) => kind(a) - kind(b) || size(b) - size(a) || a - b);
  };
  const blockName = (layer) => (layer < 0 ? "embedding" : `block ${layer}`);

  const fillGroups = () => {
    const units = page.columns.some((c) => c.kind !== "direction");
    const named = page.groups.map((name, g) => [g, name]);
    const held = named.filter(([, name]) => page.columns.some((c) => Object.hasOwn(c.member, name)));
    const options = units ? [[ALL, "all groups"], ...held] : [];
    if (page.columns.some((c) => c.kind === "direction")) options.push([DIRECTIONS, "directions (projection)"]);
    fill("group", options);
  };
  const fillLayers = () => {
    const layers = [...new Set(listed(ALL).map((c) => page.columns[c].layer))].sort((a, b) => a - b);
    fill("layer", [[ALL, `all (${layers.length})`], ...layers.map((layer) => [layer, blockName(layer)])]);
  };
  const fillColumns = () => {
    const columns = ranked(listed($("layer").value));
    const options = columns.map((c) => [c, page.columns[c].name]);
    fill("column", options);
    fillTable(columns);
  };

  // --- table --------------------------------------------------------------------------------------------------------
  const share = (x) => (x === 0 ? "" : x === 1 ? "✓" : `${shown(100 * x)} %`);
  const fillTable = (columns) => {
    const groups = page.groups.filter((name) => columns.some((c) => Object.hasOwn(page.columns[c].member, name)));
    const scores = page.scores.filter((name) => columns.some((c) => Object.hasOwn(page.columns[c].scores, name)));
    const heads = ["", ...groups, ...scores, "largest"].map((text) => make("th", text));
    $("heads").replaceChildren(make("tr", null, {}, ...heads));
    const rows = columns.map((c) => {
      const column = page.columns[c];
      const cells = [
        make("td", null, {}, make("button", column.name, { type: "button", "data-column": c })),
        ...groups.map((name) => make("td", share(Object.hasOwn(column.member, name) ? column.member[name] : 0))),
        ...scores.map((name) => make("td", Object.hasOwn(column.scores, name) ? shown(column.scores[name]) : "")),
        make("td", shown(column.scale)),
      ];
      return make("tr", null, { "data-row": c }, ...cells);
    });
    $("rows").replaceChildren(...rows);
    $("count").textContent = `${columns.length} of ${page.columns.length} columns`;
    const by = page.scores[0];
    const scored = by !== undefined && columns.some((c) => Object.hasOwn(page.columns[c].scores, by));
    $("sorted").textContent = !scored
      ? "Neurons come before heads, in the order in which their groups gave them."
      : `Neurons come before heads, each by |${by}|, the largest first.`;
  };

  // --- one column ---------------------------------------------------------------------------------------------------
  const words = (title, pairs) => {
    const items = pairs.flatMap(([word, value]) => [make("span", word, { class: "word" }), ` ${shown(value)}  `]);
    return make("p", null, {}, make("b", `${title}: `), ...items);
  };
  const drawCard = (column) => {
    const facts = [make("h2", `${column.name} · ${column.hook}`)];
    const part = (x) => (x === 1 ? "" : ` (${share(x)} of its weights)`);
    const groups = Object.entries(column.member).map(([name, x]) => name + part(x));
    if (column.kind !== "direction") facts.push(make("p", `groups: ${groups.join(", ") || "none"}`));
    const scores = Object.entries(column.scores).map(([name, x]) => `${name} ${shown(x)}`);
    if (scores.length) facts.push(make("p", `scores: ${scores.join(" · ")}`));
    if (column.note) facts.push(make("p", column.note, { class: "note" }));
    if (column.raises.length) {
      facts.push(words("raises the logits of", column.raises), words("lowers", column.lowers));
      const how = "Logits per unit of positive activation where the residual stream has RMS 1: final norm gain and "
        + "unembedding, no later block.";
      facts.push(make("p", how, { class: "note" }));
    }
    $("card").replaceChildren(...facts);
  };

  let drawn = 0;
  const tokens = (place, texts, values, limit) => {
    const div = make("div", null, { id: `tokens-${(drawn += 1)}`, class: "tokens" });
    place.append(div);
    const colours = { minValue: -limit, maxValue: limit, negativeColor: NEGATIVE, positiveColor: POSITIVE };
    const props = { tokens: texts, values: values.map((v) => Number(shown(v))), ...colours, paddingBottom: 0 };
    CircuitsVis.render(div.id, CircuitsVis.ColoredTokens, props);
  };
  const bound = (c) => {
    const { kind, scale } = page.columns[c];
    if ($("scale").value === "own") return scale;
    return Math.max(...page.columns.filter((other) => other.kind === kind).map((other) => other.scale));
  };
  const SIGNED = [-1, -0.5, 0, 0.5, 1];
  const KINDS = {
    neuron: { meaning: "activation (what the neuron multiplies its output weights by)", marks: SIGNED },
    head: { meaning: "length of what the head writes, 0 to the largest", marks: [0, 0.25, 0.5, 0.75, 1] },
    direction: { meaning: "projection on the direction", marks: SIGNED },
  };
  const drawLegend = (kind, limit) => {
    const marks = KINDS[kind].marks.map((x) => x * limit);
    $("meaning").textContent = `${KINDS[kind].meaning}:`;
    $("legend").replaceChildren();
    tokens($("legend"), marks.map((x) => `\u00a0${shown(x)}\u00a0`), marks, limit);
  };
  const order = {
    strongest: (c) => (a, b) => strongest(c, b) - strongest(c, a) || a - b,
    highest: (c) => (a, b) => highest(c, b) - highest(c, a) || a - b,
    lowest: (c) => (a, b) => lowest(c, a) - lowest(c, b) || a - b,
    given: () => (a, b) => a - b,
  };
  const drawPrompts = (c, limit) => {
    const numbers = page.prompts.map((_, i) => i).sort(order[$("order").value](c));
    const count = $("shown").value === ALL ? numbers.length : Number($("shown").value);
    $("prompts").replaceChildren();
    for (const i of numbers.slice(0, count)) {
      const { label, harmful, tokens: ids, cut } = page.prompts[i];
      const range = `highest ${shown(highest(c, i))}, lowest ${shown(lowest(c, i))}`;
      const missing = cut ? [`${cut} tokens of the answer left out`] : [];
      const title = [`prompt ${i + 1}`, ...(label === null ? [] : [label]), range, ...missing].join(" · ");
      const draw = (place) => tokens(place, ids.map((id) => page.words[id]), valuesOf(c, i), limit);
      if (!harmful) {
        const place = make("section", null, { class: "prompt", "data-prompt": i }, make("h3", title));
        $("prompts").append(place);
        draw(place);
        continue;
      }
      const summary = make("summary", `${title} · folded: click to read it`);
      const place = make("details", null, { class: "prompt", "data-prompt": i }, summary);
      place.addEventListener("toggle", () => place.querySelector(".tokens") || draw(place), { once: true });
      $("prompts").append(place);
    }
  };
  const draw = () => {
    const c = Number($("column").value);
    const limit = bound(c);
    for (const row of $("rows").children) row.classList.toggle("chosen", row.dataset.row === String(c));
    drawCard(page.columns[c]);
    drawLegend(page.columns[c].kind, limit);
    drawPrompts(c, limit);
  };

  const refill = (...lists) => () => {
    for (const list of lists) list();
    draw();
  };
  $("group").addEventListener("change", refill(fillLayers, fillColumns));
  $("layer").addEventListener("change", refill(fillColumns));
  for (const id of ["column", "order", "shown", "scale"]) $(id).addEventListener("change", draw);
  $("rows").addEventListener("click", (event) => {
    if (event.target.dataset.column === undefined) return;
    $("column").value = event.target.dataset.column;
    draw();
  });
  refill(fillGroups, fillLayers, fillColumns)();
})();
