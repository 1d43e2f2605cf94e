//! svm
#![no_std]
