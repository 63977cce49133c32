// Dark or light: as the system has it, until somebody says otherwise.

const KEY = "lipsync.theme";

/** Set the page's theme, and let a button turn it. */
export function followTheme(button) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function show() {
    const theme = stored() ?? (dark.matches ? "dark" : "light");
    const other = theme === "dark" ? "light" : "dark";
    root.dataset.theme = theme;
    button.textContent = other === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Use the ${other} theme`);
  }

  dark.addEventListener("change", show);
  button.addEventListener("click", () => {
    localStorage.setItem(KEY, root.dataset.theme === "dark" ? "light" : "dark");
    show();
  });
  show();
}

function stored() {
  const theme = localStorage.getItem(KEY);
  return theme === "dark" || theme === "light" ? theme : null;
}
