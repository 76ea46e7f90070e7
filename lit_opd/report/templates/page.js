"use strict";
// Draws what the page's data holds: lines by uPlot, heat maps on a canvas; tables that sort; samples with their tokens.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (number) => css("--c" + (number % 8));
  const dashes = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
  const HEIGHT = 230, FEW = 40, FONT = "12px system-ui, sans-serif";

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function shown(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size >= 0.01 || size === 0 ? value.toFixed(size >= 100 ? 1 : 3) : value.toPrecision(2);
  }

  // -- lines ---------------------------------------------------------------------------------------------------------

  function joined(series) {
    // every series has places of its own; a place of one alone is a gap of the others, which lines go across
    return uPlot.join(series.map((own) => [own.x, own.y, ...(own.low ? [own.low, own.high] : [])]));
  }

  function options(spec, width) {
    const ink = css("--soft"), line = css("--line"), series = [{ label: spec.x, value: (_, v) => shown(v) }], bands = [];
    for (const own of spec.series) {
      const stroke = color(own.color), look = own.dashed ? [6, 4] : dashes[Math.floor(own.color / 8) % 4];
      const measured = own.y.filter((v) => v !== null).length;
      const points = own.points ? measured <= FEW : measured === 1;
      series.push({ label: own.name, stroke, width: 2, dash: look, spanGaps: true, points: { show: points, size: 6, fill: stroke }, value: (_, v) => shown(v) });
      if (own.low) {
        const end = { label: own.name + " interval", class: "u-end", width: 0, spanGaps: true, points: { show: false } };
        bands.push({ series: [series.length + 1, series.length], fill: stroke + "26" });
        series.push(end, { ...end });
      }
    }
    const axis = { stroke: ink, font: FONT, labelFont: FONT, labelSize: 18, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 } };
    const numbers = (u, ticks) => ticks.map((v) => (v === null ? null : Number(v.toPrecision(6)).toLocaleString("en")));
    return {
      width, height: HEIGHT, series, bands,
      scales: {
        x: { time: false, distr: spec.log_x ? 3 : 1, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { range: (u, low, high) => limits(spec, low, high) },
      },
      axes: [
        { ...axis, label: spec.x, size: 34, values: numbers, space: 55, incrs: spec.x === "optimizer step" ? [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] : undefined },
        { ...axis, size: (u, values) => 14 + 7 * Math.max(1, ...(values || []).map((v) => String(v).length)), values: numbers, space: 34 },
      ],
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      legend: { markers: { width: 3, dash: (u, at) => (u.series[at].dash?.length ? "dashed" : "solid") } },
      hooks: { drawAxes: [(u) => aside(u, spec)] },
    };
  }

  function limits(spec, low, high) {
    if (low === null || high === null) return [0, 1];
    if (spec.reference !== null) { low = Math.min(low, spec.reference); high = Math.max(high, spec.reference); }
    if (spec.from_zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
    const room = 0.06 * (high - low) || 0.5;
    return [low === 0 ? 0 : low - room, high === 0 ? 0 : high + room];
  }

  function aside(u, spec) {
    // the grey part and the line to compare with, below the data
    const { left, top, width, height } = u.bbox, c = u.ctx;
    c.save();
    if (spec.shaded_from !== null) {
      const from = Math.max(left, u.valToPos(spec.shaded_from, "x", true));
      c.globalAlpha = 0.12; c.fillStyle = css("--soft"); c.fillRect(from, top, Math.max(0, left + width - from), height);
    }
    if (spec.reference !== null) {
      const y = u.valToPos(spec.reference, "y", true);
      c.globalAlpha = 1; c.strokeStyle = css("--soft"); c.setLineDash([2, 3]); c.lineWidth = devicePixelRatio;
      c.beginPath(); c.moveTo(left, y); c.lineTo(left + width, y); c.stroke();
    }
    c.restore();
  }

  // -- heat maps -----------------------------------------------------------------------------------------------------

  const STOPS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  const viridis = (share) => {
    const place = Math.max(0, Math.min(1, share)) * (STOPS.length - 1), at = Math.min(STOPS.length - 2, Math.floor(place));
    return "rgb(" + STOPS[at].map((v, i) => Math.round(v + (place - at) * (STOPS[at + 1][i] - v))).join() + ")";
  };

  function ticks(low, high, most) {
    const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((m) => m * unit >= rough), found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) found.push(Number(v.toPrecision(8)));
    return found;
  }

  function heat(box, spec) {
    const ratio = devicePixelRatio || 1, width = box.clientWidth, left = 46, bottom = 38, top = 8, right = 8;
    const canvas = make("canvas"), c = canvas.getContext("2d");
    canvas.width = width * ratio; canvas.height = HEIGHT * ratio; canvas.style.width = width + "px"; canvas.style.height = HEIGHT + "px";
    c.scale(ratio, ratio);
    const xs = spec.x_edges, ys = spec.y_edges, w = width - left - right, h = HEIGHT - top - bottom;
    const px = (v) => left + ((v - xs[0]) / (xs[xs.length - 1] - xs[0])) * w;
    const py = (v) => top + h - ((v - ys[0]) / (ys[ys.length - 1] - ys[0])) * h;
    const all = spec.values.flat().filter((v) => v !== null).sort((a, b) => a - b);
    const low = spec.from_zero ? 0 : all[0], high = spec.from_zero ? all[Math.floor(0.99 * (all.length - 1))] : all[all.length - 1];
    const scale = high > low ? high - low : 1;
    spec.values.forEach((column, i) => column.forEach((v, j) => {
      if (v === null) return;
      c.fillStyle = viridis((v - low) / scale);
      c.fillRect(px(xs[i]), py(ys[j + 1]), px(xs[i + 1]) - px(xs[i]) + 0.6, py(ys[j]) - py(ys[j + 1]) + 0.6);
    }));
    c.fillStyle = css("--soft"); c.font = FONT; c.textAlign = "center";
    for (const v of ticks(xs[0], xs[xs.length - 1], Math.max(2, w / 80))) c.fillText(shown(v), px(v), top + h + 15);
    c.fillText(spec.x, left + w / 2, HEIGHT - 4);
    c.textAlign = "right";
    for (const v of ticks(ys[0], ys[ys.length - 1], 5)) c.fillText(shown(v), left - 6, py(v) + 4);
    c.save(); c.translate(11, top + h / 2); c.rotate(-Math.PI / 2); c.textAlign = "center"; c.fillText(spec.y, 0, 0, h + 16); c.restore();
    const legend = make("div", "heat-legend"), bar = make("span", "heat-bar"), said = make("span", "heat-said");
    bar.style.background = "linear-gradient(90deg," + STOPS.map((s) => "rgb(" + s.join() + ")").join() + ")";
    legend.append(make("span", "", shown(low)), bar, make("span", "", shown(high) + (spec.from_zero ? " and more " : " ") + spec.unit), said);
    canvas.addEventListener("pointermove", (event) => {
      const x = xs[0] + ((event.offsetX - left) / w) * (xs[xs.length - 1] - xs[0]), y = ys[0] + ((top + h - event.offsetY) / h) * (ys[ys.length - 1] - ys[0]);
      const i = xs.findIndex((edge, at) => at && x <= edge) - 1, j = ys.findIndex((edge, at) => at && y <= edge) - 1;
      const value = x >= xs[0] && y >= ys[0] && i >= 0 && j >= 0 ? spec.values[i][j] : undefined;
      said.textContent = value === undefined ? "" : "to step " + shown(xs[i + 1]) + ", " + shown(ys[j]) + " to " + shown(ys[j + 1]) + " %: " + shown(value);
    });
    canvas.addEventListener("pointerleave", () => (said.textContent = ""));
    box.replaceChildren(canvas, legend);
  }

  // -- all of them, again when the width or the scheme changes -------------------------------------------------------

  const boxes = [...document.querySelectorAll("[data-drawing]")], plots = new Map();
  function draw(box) {
    const spec = data.drawings[Number(box.dataset.drawing)];
    if (spec.kind === "heat") return heat(box, spec);
    plots.get(box)?.destroy();
    plots.set(box, new uPlot(options(spec, box.clientWidth), joined(spec.series), box));
  }
  const widths = new Map();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const width = target.clientWidth;
      if (!width || widths.get(target) === width) continue;
      widths.set(target, width);
      if (plots.has(target)) plots.get(target).setSize({ width, height: HEIGHT }); else draw(target);
    }
  });
  boxes.forEach((box) => observer.observe(box));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => boxes.filter((box) => box.clientWidth).forEach(draw));

  // -- tables --------------------------------------------------------------------------------------------------------

  const number = (cell) => {
    const text = cell.dataset.sort ?? cell.textContent.replace(/,/g, "").replace("−", "-");
    const found = parseFloat(text.replace(/^[<>=~ ]+/, ""));
    return Number.isNaN(found) ? null : found;
  };
  function sort(table, column, falling) {
    const body = table.tBodies[0], rows = [...body.rows], value = (row) => number(row.cells[column]);
    const filled = rows.filter((row) => row.cells[column].textContent.trim());
    const numeric = column > 0 && filled.length > 0 && filled.every((row) => value(row) !== null);
    const order = (a, b) => {
      if (!numeric) return a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
      return (value(a) ?? -Infinity) - (value(b) ?? -Infinity);
    };
    rows.sort((a, b) => (falling ? -order(a, b) : order(a, b)));
    body.append(...rows);
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = make("button", "", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        sort(table, column, falling);
      });
    });
  }

  // -- samples -------------------------------------------------------------------------------------------------------

  const section = document.getElementById("samples");
  if (!section || !data.samples) return;
  const byId = (name) => document.getElementById(name);
  const PAGE = 6, samples = data.samples, total = Number(section.dataset.total).toLocaleString("en");
  const WORDS = { correct: "right", wrong: "wrong", truncated: "box not closed", no_answer: "no answer", timeout: "not decided" };
  const verdictOf = (sample) => WORDS[sample.verdict] ?? (sample.answer === null ? "no reference" : "not decided");
  const SORTS = {
    "newest step": (a, b) => b.step - a.step,
    "oldest step": (a, b) => a.step - b.step,
    "disagreement, highest": (a, b) => (b.disagreement ?? -1) - (a.disagreement ?? -1),
    "disagreement, lowest": (a, b) => (a.disagreement ?? 1e9) - (b.disagreement ?? 1e9),
    "mean weight, highest": (a, b) => (b.weight_mean ?? -1) - (a.weight_mean ?? -1),
    "length, longest": (a, b) => (b.length ?? 0) - (a.length ?? 0),
    "length, shortest": (a, b) => (a.length ?? 0) - (b.length ?? 0),
  };
  const gap = (tokens, at) => Math.abs(tokens.teacher_logprob[at] - tokens.student_logprob[at]);
  const weights = samples.flatMap((s) => s.tokens?.weight ?? (s.weight_by_tenth ?? []).filter((v) => v !== null));
  const gaps = samples.flatMap((s) => s.tokens ? s.tokens.weight.map((_, at) => gap(s.tokens, at)) : (s.disagreement_by_tenth ?? []).filter((v) => v !== null)).sort((a, b) => a - b);
  const least = weights.reduce((a, b) => Math.min(a, b), Infinity), most = weights.reduce((a, b) => Math.max(a, b), -Infinity);
  const strong = gaps.length ? gaps[Math.min(gaps.length - 1, Math.floor(0.95 * gaps.length))] : 0;
  const shade = (weight) => (most > least ? (weight - least) / (most - least) : 0.5).toFixed(3);
  const under = (value) => (strong > 0 ? Math.min(1, value / strong) : 0).toFixed(3);
  let page = 0;

  function choices(select, names) {
    select.append(...names.map((name) => { const option = make("option", "", name); option.value = name; return option; }));
    select.addEventListener("change", () => { page = 0; list(); });
  }
  function token(tokens, at) {
    const span = make("span", "t", tokens.text[at].replace(/\n/g, "↵\n") || "·");
    span.style.setProperty("--w", shade(tokens.weight[at]));
    span.style.setProperty("--d", under(gap(tokens, at)));
    const turn = tokens.turn?.[at];
    span.title = "position " + (at + 1) + (turn === undefined ? "" : ", turn " + (turn + 1)) + "\nweight " + shown(tokens.weight[at]) + "\nstudent " + shown(tokens.student_logprob[at]) + "\nteacher " + shown(tokens.teacher_logprob[at]) + "\ndisagreement " + shown(gap(tokens, at)) + " nats";
    return span;
  }
  function tenths(values, kind, name) {
    const row = make("div", "tenths" + (kind === "w" ? " w" : ""));
    row.append(...values.map((value, at) => {
      const cell = make("span");
      cell.style.setProperty("--" + kind, value === null ? 0 : kind === "w" ? shade(value) : under(value));
      cell.title = name + " at " + 10 * at + " to " + (10 * at + 10) + " %: " + shown(value);
      return cell;
    }));
    return row;
  }
  function shownSample(sample) {
    const box = make("article", "sample"), facts = make("div", "facts"), response = make("pre", "response");
    facts.append(make("span", "verdict " + (sample.verdict ?? ""), verdictOf(sample)), make("span", "", "step " + shown(sample.step)), make("span", "", sample.row_id ?? ""));
    if (sample.answer !== null) facts.append(make("span", "", "reference " + sample.answer));
    facts.append(make("span", "", shown(sample.length) + " tokens, ended by " + sample.finish_reason));
    facts.append(make("span", "", "disagreement " + shown(sample.disagreement) + " nats/token"), make("span", "", "mean weight " + shown(sample.weight_mean)));
    if (sample.teacher !== null) facts.append(make("span", "", "teacher " + sample.teacher));
    box.append(facts, make("pre", "prompt", sample.prompt ?? ""));
    if (sample.tokens) {
      response.append(...sample.tokens.text.flatMap((_, at) => {
        const heard = sample.tokens.heard?.[at];
        return [...(heard ? [make("span", "unit", heard.replace(/\n/g, "↵\n"))] : []), token(sample.tokens, at)];
      }));
      if (sample.tokens.text.length < sample.length) response.append(make("span", "unit", " … " + (sample.length - sample.tokens.text.length) + " more tokens"));
      box.append(response);
    } else {
      response.textContent = sample.response ?? "";
      box.append(response);
      if (sample.disagreement_by_tenth) box.append(tenths(sample.disagreement_by_tenth, "d", "disagreement"));
      if (sample.weight_by_tenth) box.append(tenths(sample.weight_by_tenth, "w", "weight"));
    }
    return box;
  }
  function list() {
    const verdict = byId("verdict").value, step = byId("step").value;
    const chosen = samples.filter((s) => (verdict === "all" || verdictOf(s) === verdict) && (step === "all" || String(s.step) === step));
    chosen.sort(SORTS[byId("sort").value]);
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
    page = Math.min(page, pages - 1);
    const part = chosen.slice(page * PAGE, (page + 1) * PAGE);
    byId("list").className = (byId("shade").checked ? "shaded " : "") + (byId("line").checked ? "underlined" : "");
    byId("list").replaceChildren(...part.map(shownSample));
    const range = part.length ? page * PAGE + 1 + " to " + (page * PAGE + part.length) : "none";
    const here = samples.length.toLocaleString("en");
    byId("which").textContent = "Samples " + range + " of " + chosen.length + (chosen.length < samples.length ? " chosen from " + here : "") + " on this page; samples.jsonl has " + total + ". Point at a token for its numbers; ↵ is a line break, · part of a character.";
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
    section.querySelector(".pager").hidden = pages < 2;
  }
  choices(byId("verdict"), ["all", ...new Set(samples.map(verdictOf))]);
  choices(byId("step"), ["all", ...new Set(samples.map((s) => String(s.step)))]);
  choices(byId("sort"), Object.keys(SORTS));
  for (const name of ["shade", "line"]) byId(name).addEventListener("change", list);
  byId("weights").textContent = weights.length ? shown(least) + " to " + shown(most) : "";
  byId("disagreements").textContent = "0 to " + shown(strong) + " nats and more";
  byId("previous").addEventListener("click", () => { page -= 1; list(); });
  byId("next").addEventListener("click", () => { page += 1; list(); });
  section.querySelector(".controls").hidden = false;
  list();
})();
