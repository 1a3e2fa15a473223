// Before anything is drawn, so that a dark page does not flash up light. Storage can be forbidden, as on some file:// pages.
(() => {
  let kept = null;
  try { kept = localStorage.getItem("bce3s-theme"); } catch { kept = null; }
  const dark = kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
