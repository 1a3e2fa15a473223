(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const configs = JSON.parse(document.getElementById("configs").textContent);
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const said = document.getElementById("said");
  let drawn = [];
  let drawing = 0;

  // A step of a chart's expressions is interpreted: compiled, it would need a page that allows eval.
  async function draw() {
    const turn = ++drawing;
    const theme = root.dataset.theme;
    root.dataset.drawn = "";
    drawn.forEach((chart) => chart.finalize());
    drawn = [];
    for (const [name, { spec, renderer }] of Object.entries(charts)) {
      const options = { config: configs[theme], renderer, actions: false, ast: true };
      const chart = await vegaEmbed(document.getElementById(name), spec, options);
      if (turn !== drawing) { chart.finalize(); return; }
      drawn.push(chart);
    }
    root.dataset.drawn = theme;
  }

  function label() {
    button.textContent = root.dataset.theme === "dark" ? "Light colours" : "Dark colours";
  }

  function show(theme) {
    root.dataset.theme = theme;
    label();
    return draw();
  }

  button.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("bce3s-theme", theme); } catch { /* it holds until the page is closed */ }
    show(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => show(event.matches ? "dark" : "light"));

  document.querySelectorAll("button.copy").forEach((copy) => {
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        said.textContent = "Copied.";
        copy.firstChild.textContent = "Copied";
        setTimeout(() => { copy.firstChild.textContent = "Copy"; }, 1500);
      } catch {
        getSelection().selectAllChildren(code);
        said.textContent = "The command is selected: copy it with the keyboard.";
      }
    });
  });

  label();
  draw();
})();
