//! The sources of the program, parsed, without their tests.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, File, ImplItemFn, Item, ItemFn, TraitItemFn, UseTree};

/// Where in a source file: the path from the root of the project, and the line.
#[derive(Debug, Clone)]
pub struct At {
    pub file: String,
    pub line: usize,
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A path as it is used, such as `crate::nats::Lane`, made absolute within the crate where it begins with `crate`, `self`
/// or `super`.
#[derive(Debug, Clone)]
pub struct Used {
    pub at: At,
    pub segments: Vec<String>,
}

impl Used {
    /// The module of the root crate, or the crate of the workspace, that it leads to: one that has a row.
    pub fn leads_to(&self, rows: &[&[&'static str]]) -> Option<&'static str> {
        let mut names = rows.iter().flat_map(|row| row.iter().copied());
        let inner = self.at.file.starts_with("crates/");
        match self.segments.as_slice() {
            [krate, module, ..] if krate == "stream_replicator" || (krate == "crate" && !inner) => {
                names.find(|name| name == module)
            }
            [krate, ..] => names.find(|name| name.contains('-') && name.replace('-', "_") == *krate),
            [] => None,
        }
    }

    /// Replaces a name that was imported by the path that it stands for.
    fn resolve(&mut self, imported: &HashMap<String, Vec<String>>) {
        if let Some(whole) = self.segments.first().and_then(|first| imported.get(first)) {
            self.segments.splice(0..1, whole.iter().cloned());
        }
    }
}

/// A function outside of tests.
#[derive(Debug)]
pub struct Function {
    pub at: At,
    pub name: String,
    pub lines: usize,
    pub nesting: usize,
    pub is_async: bool,
}

/// One file.
#[derive(Debug)]
pub struct Source {
    /// From the root of the project, with `/`.
    pub path: String,
    /// Lines without in-file tests.
    pub lines: usize,
    pub used: Vec<Used>,
    pub functions: Vec<Function>,
    /// Names of structs, enums, unions, traits and type aliases.
    pub types: Vec<(String, At)>,
    /// String literals.
    pub strings: Vec<(String, At)>,
    /// Names of methods that are called.
    pub methods: Vec<(String, At)>,
}

impl Source {
    /// All files of the program and its crates.
    pub fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = Vec::new();
        find(&root.join("src"), &mut files);
        for krate in fs::read_dir(root.join("crates")).into_iter().flatten().flatten() {
            find(&krate.path().join("src"), &mut files);
        }
        files.sort();
        assert!(files.len() > 100, "only {} files below {}", files.len(), root.display());
        files.iter().map(|file| Self::read(root, file)).collect()
    }

    fn read(root: &Path, file: &Path) -> Self {
        let path = file.strip_prefix(root).unwrap_or(file).display().to_string();
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self::parse(&path, &text)
    }

    /// A file with this path and text.
    pub fn parse(path: &str, text: &str) -> Self {
        let parsed: File = syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: {error}"));
        let tests: usize = parsed.items.iter().filter(|item| is_test(attributes(item))).map(lines).sum();
        let mut found = Finder { path, module: module_of(path), ..Finder::default() };
        found.visit_file(&parsed);
        let Finder { mut used, imported, functions, types, strings, methods, .. } = found;
        for path in &mut used {
            path.resolve(&imported);
        }
        let lines = text.lines().count().saturating_sub(tests);
        Self { path: path.to_owned(), lines, used, functions, types, strings, methods }
    }

    /// The module of the crate root, or the crate, that the file belongs to: `copy` for `src/copy/run.rs`, `nats-lane` for
    /// `crates/nats-lane/src/lane.rs`.
    pub fn top(&self) -> Option<&str> {
        if self.path.starts_with("crates/") {
            return self.path.split('/').nth(1);
        }
        let rest = self.path.strip_prefix("src/")?;
        let first = rest.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first)).filter(|name| *name != "lib")
    }

    /// The path of the module within the crate: `copy::run` for `src/copy/run.rs`.
    pub fn module(&self) -> String {
        module_of(&self.path).join("::")
    }
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            find(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Segments of the module of a file, within its crate.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.split_once("src/").map_or(path, |(_, rest)| rest).trim_end_matches(".rs");
    let parts = inner.split('/').map(str::to_owned);
    parts.filter(|part| !matches!(part.as_str(), "lib" | "main" | "mod")).collect()
}

fn lines(item: &Item) -> usize {
    let span = item.span();
    // Attributes and the empty line before it.
    span.end().line - span.start().line + 3
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Mod(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        Item::Const(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        _ => &[],
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let tokens = match &attribute.meta {
            syn::Meta::List(list) => list.tokens.to_string(),
            _ => String::new(),
        };
        attribute.path().is_ident("cfg") && tokens == "test"
    })
}

#[derive(Default)]
struct Finder<'a> {
    path: &'a str,
    module: Vec<String>,
    used: Vec<Used>,
    /// Names that `use` brings in, and the paths that they stand for.
    imported: HashMap<String, Vec<String>>,
    functions: Vec<Function>,
    types: Vec<(String, At)>,
    strings: Vec<(String, At)>,
    methods: Vec<(String, At)>,
}

impl Finder<'_> {
    fn at(&self, span: Span) -> At {
        At { file: self.path.to_owned(), line: span.start().line }
    }

    fn uses(&mut self, span: Span, segments: Vec<String>) {
        let segments = self.absolute(segments);
        self.used.push(Used { at: self.at(span), segments });
    }

    fn absolute(&self, segments: Vec<String>) -> Vec<String> {
        let mut absolute = segments;
        let here = &self.module;
        match absolute.first().map(String::as_str) {
            Some("self") => {
                absolute.splice(0..1, std::iter::once("crate".to_owned()).chain(here.iter().cloned()));
            }
            Some("super") => {
                let ups = absolute.iter().take_while(|segment| *segment == "super").count();
                let base = here[..here.len().saturating_sub(ups)].to_vec();
                absolute.splice(0..ups, std::iter::once("crate".to_owned()).chain(base));
            }
            _ => {}
        }
        absolute
    }

    fn tree(&mut self, prefix: &mut Vec<String>, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.tree(prefix, &path.tree);
                prefix.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(prefix, tree)),
            UseTree::Name(name) => self.leaf(prefix, &name.ident, &name.ident),
            UseTree::Rename(rename) => self.leaf(prefix, &rename.ident, &rename.rename),
            UseTree::Glob(glob) => self.uses(glob.span(), prefix.clone()),
        }
    }

    fn leaf(&mut self, prefix: &[String], name: &syn::Ident, bound: &syn::Ident) {
        let mut whole = prefix.to_vec();
        let mut bound = bound.to_string();
        if name != "self" {
            whole.push(name.to_string());
        } else if bound == "self" {
            bound = prefix.last().cloned().unwrap_or(bound);
        }
        let path = self.absolute(whole.clone());
        // `use rand;` stands for itself.
        if path.len() > 1 || path.first() != Some(&bound) {
            self.imported.insert(bound, path);
        }
        self.uses(name.span(), whole);
    }

    fn function(&mut self, name: &syn::Ident, signature: &syn::Signature, span: Span, block: &syn::Block) {
        let mut depth = Depth::default();
        depth.visit_block(block);
        self.functions.push(Function {
            at: self.at(name.span()),
            name: name.to_string(),
            lines: span.end().line - signature.span().start().line + 1,
            nesting: depth.most,
            is_async: signature.asyncness.is_some(),
        });
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if is_test(attributes(item)) {
            return;
        }
        let named = match item {
            Item::Struct(item) => Some(&item.ident),
            Item::Enum(item) => Some(&item.ident),
            Item::Union(item) => Some(&item.ident),
            Item::Trait(item) => Some(&item.ident),
            Item::Type(item) => Some(&item.ident),
            _ => None,
        };
        if let Some(name) = named {
            self.types.push((name.to_string(), self.at(name.span())));
        }
        visit::visit_item(self, item);
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&mut Vec::new(), &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            let segments = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.uses(path.span(), segments);
        }
        visit::visit_path(self, path);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        self.methods.push((call.method.to_string(), self.at(call.method.span())));
        visit::visit_expr_method_call(self, call);
    }

    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        self.function(&item.sig.ident, &item.sig, item.span(), &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        self.function(&item.sig.ident, &item.sig, item.span(), &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig.ident, &item.sig, item.span(), block);
        }
        visit::visit_trait_item_fn(self, item);
    }

    /// Doc comments are no texts of the program.
    fn visit_attribute(&mut self, _: &'ast Attribute) {}

    fn visit_lit_str(&mut self, literal: &'ast syn::LitStr) {
        self.strings.push((literal.value(), self.at(literal.span())));
    }

    /// Paths and texts within macros such as `format!` and `select!`.
    fn visit_macro(&mut self, node: &'ast syn::Macro) {
        let mut tokens = Tokens { finder: self, path: Vec::new() };
        tokens.all(node.tokens.clone());
        visit::visit_macro(self, node);
    }
}

/// Reads what a macro is given, where it cannot be parsed as Rust.
struct Tokens<'a, 'b> {
    finder: &'a mut Finder<'b>,
    path: Vec<(String, Span)>,
}

impl Tokens<'_, '_> {
    fn all(&mut self, tokens: proc_macro2::TokenStream) {
        use proc_macro2::TokenTree;
        let (mut colons, mut dot) = (0, false);
        for token in tokens {
            let after_dot = std::mem::take(&mut dot);
            match token {
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Ident(name) => {
                    if after_dot {
                        self.finder.methods.push((name.to_string(), self.finder.at(name.span())));
                    }
                    if colons != 2 {
                        self.end();
                    }
                    self.path.push((name.to_string(), name.span()));
                }
                TokenTree::Group(group) => {
                    self.end();
                    self.all(group.stream());
                }
                TokenTree::Literal(literal) => {
                    self.end();
                    let parsed: Result<syn::LitStr, _> = syn::parse_str(&literal.to_string());
                    if let Ok(text) = parsed {
                        let at = self.finder.at(literal.span());
                        self.finder.strings.push((text.value(), at));
                    }
                }
                TokenTree::Punct(punct) => {
                    dot = punct.as_char() == '.';
                    self.end();
                }
            }
            colons = 0;
        }
        self.end();
    }

    fn end(&mut self) {
        let path = std::mem::take(&mut self.path);
        if let Some((_, span)) = path.first().filter(|_| path.len() > 1) {
            let span = *span;
            self.finder.uses(span, path.into_iter().map(|(name, _)| name).collect());
        }
    }
}

/// How deep blocks are within each other.
#[derive(Default)]
struct Depth {
    now: usize,
    most: usize,
}

impl Depth {
    fn within(&mut self, visit: impl FnOnce(&mut Self)) {
        self.now += 1;
        self.most = self.most.max(self.now);
        visit(self);
        self.now -= 1;
    }
}

impl<'ast> Visit<'ast> for Depth {
    fn visit_expr_if(&mut self, node: &'ast syn::ExprIf) {
        self.visit_expr(&node.cond);
        self.within(|depth| depth.visit_block(&node.then_branch));
        match node.else_branch.as_ref().map(|(_, other)| &**other) {
            // `else if` is no deeper than `if`.
            Some(syn::Expr::If(other)) => self.visit_expr_if(other),
            Some(other) => self.within(|depth| visit::visit_expr(depth, other)),
            None => {}
        }
    }

    fn visit_expr_match(&mut self, node: &'ast syn::ExprMatch) {
        self.visit_expr(&node.expr);
        self.within(|depth| node.arms.iter().for_each(|arm| depth.visit_arm(arm)));
    }

    fn visit_expr_for_loop(&mut self, node: &'ast syn::ExprForLoop) {
        self.visit_expr(&node.expr);
        self.within(|depth| depth.visit_block(&node.body));
    }

    fn visit_expr_while(&mut self, node: &'ast syn::ExprWhile) {
        self.visit_expr(&node.cond);
        self.within(|depth| depth.visit_block(&node.body));
    }

    fn visit_expr_loop(&mut self, node: &'ast syn::ExprLoop) {
        self.within(|depth| depth.visit_block(&node.body));
    }

    fn visit_expr_async(&mut self, node: &'ast syn::ExprAsync) {
        self.within(|depth| visit::visit_expr_async(depth, node));
    }

    fn visit_item(&mut self, _: &'ast Item) {
        // A function within a function counts by itself.
    }
}
