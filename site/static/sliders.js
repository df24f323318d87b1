// Sliders over recorded points. Each position is a model that was trained and measured; nothing is interpolated.

const bar = (label, value) => {
  const row = document.createElement("div");
  row.className = "recorded-row";
  row.innerHTML = `<span>${label}</span><meter min="0" max="100" aria-label="${label}"></meter><output></output>`;
  row.querySelector("meter").value = value;
  row.querySelector("output").textContent = `${value.toFixed(1)} %`;
  return row;
};

const show = (place, name, point) => {
  const title = document.createElement("p");
  title.className = "recorded-name";
  title.textContent = name;
  place.append(title, bar("ASR", point.asr), bar("utility", point.utility));
};

const setUp = (widget) => {
  const { letter, lines } = JSON.parse(widget.querySelector("script").textContent);
  const positions = [...new Set(Object.values(lines).flat().map((point) => point.at))].sort((a, b) => a - b);
  const label = document.createElement("label");
  const slider = document.createElement("input");
  const shown = document.createElement("strong");
  const bars = document.createElement("div");
  bars.setAttribute("aria-live", "polite");
  Object.assign(slider, { type: "range", min: 0, max: positions.length - 1, step: 1, value: 0 });
  label.append(`${letter} = `, shown, slider);
  const move = () => {
    const at = positions[slider.value];
    shown.textContent = at;
    slider.setAttribute("aria-valuetext", `${letter} = ${at}`);
    bars.replaceChildren();
    for (const [name, points] of Object.entries(lines)) {
      const point = points.find((each) => each.at === at);
      if (point) show(bars, `${name} (n = ${point.n}, ${point.seeds === 1 ? "one seed" : `${point.seeds} seeds`})`, point);
    }
  };
  slider.addEventListener("input", move);
  widget.querySelector(".recorded-view").append(label, bars);
  move();
};

document.querySelectorAll(".recorded").forEach(setUp);
