// Before anything is drawn: the reader's own choice of light or dark, where there is one. page.css knows the rest.
"use strict";
try {
  const theme = localStorage.getItem("sftflow.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing shows the theme of the system.
}
